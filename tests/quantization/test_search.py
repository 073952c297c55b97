from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3_mlflow.core.errors import EnvironmentProblem, UserError
from phi3_mlflow.quantization.search import CandidateMetrics, search
from phi3_mlflow.quantization.search_settings import Budget
from phi3_mlflow.quantization.settings import KQuantMixedSettings, QuantizationSettings

SETTINGS = KQuantMixedSettings()


def _found(kl: float, size: int, speed: float = 50.0, top1: float = 0.9) -> CandidateMetrics:
    return CandidateMetrics(kl, top1, 10.0, size, speed)


def _search(found: dict[str, CandidateMetrics], budget: Budget | None = None):
    return search(dict.fromkeys(found, SETTINGS), lambda name, _: found[name], budget or Budget())


def test_the_least_divergence_within_the_budget_wins() -> None:
    found = {"small": _found(0.4, 80), "good": _found(0.1, 110), "large": _found(0.01, 150)}
    ranking = _search(found, Budget(data_bytes=115))
    assert [one.name for one in ranking.candidates] == ["good", "small", "large"]
    assert ranking.best.name == "good"
    assert ranking.candidates[2].reasons == ("35 bytes over the budget of 115",)


def test_equal_quality_is_told_apart_by_size() -> None:
    assert _search({"a": _found(0.1, 120), "b": _found(0.1, 100)}).best.name == "b"


def test_the_front_leaves_out_what_another_beats() -> None:
    found = {
        "a": _found(0.4, 80),
        "b": _found(0.5, 90),
        "c": _found(0.1, 110),
        "d": _found(0.1, 110),
    }
    on_front = {one.name for one in _search(found).candidates if one.on_front}
    assert on_front == {"a", "c", "d"}


def test_one_that_fails_is_last_and_says_why() -> None:
    def measure(name: str, _: QuantizationSettings) -> CandidateMetrics:
        if name == "needs more":
            raise EnvironmentProblem("memory: 9.0 GiB needed")
        return _found(0.2, 100)

    ranking = search({"needs more": SETTINGS, "fits": SETTINGS}, measure, Budget())
    assert ranking.best.name == "fits"
    assert ranking.candidates[1].reasons == ("memory: 9.0 GiB needed",)
    assert not ranking.candidates[1].on_front


def test_none_within_the_budget_lists_what_each_lacks() -> None:
    budget = Budget(data_bytes=50, tokens_per_second=60, kl_mean=0.1, top1_agreement=0.95)
    ranking = _search({"a": _found(0.4, 80)}, budget)
    with pytest.raises(UserError, match="a: 30 bytes over") as caught:
        _ = ranking.best
    for reason in ("50.0 tokens/s", "divergence 0.4000", "agreement 0.900"):
        assert reason in str(caught.value)


def test_no_candidates_is_refused() -> None:
    with pytest.raises(UserError, match="no candidates"):
        search({}, lambda name, settings: _found(0, 0), Budget())


@given(st.lists(st.tuples(st.floats(0, 2), st.integers(1, 200)), min_size=1, max_size=12))
def test_nothing_within_the_budget_beats_the_first(pairs: list[tuple[float, int]]) -> None:
    found = {str(i): _found(kl, size) for i, (kl, size) in enumerate(pairs)}
    ranking = _search(found, Budget(data_bytes=100))
    assert len(ranking.candidates) == len(found)
    fitting = [one for one in found.values() if one.data_bytes <= 100]
    if fitting:
        best = ranking.best.measurement
        assert best is not None
        assert best.kl_mean == min(one.kl_mean for one in fitting)
    front = [one.measurement for one in ranking.candidates if one.on_front]
    assert front
