"""What was measured once is found again, and measured again when anything that counts differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from phi3_mlflow.artifacts.cache import StepCache
from phi3_mlflow.artifacts.code_keys import closure
from phi3_mlflow.evaluation import measure
from phi3_mlflow.evaluation.items import HeldoutText, Needle, Question
from phi3_mlflow.evaluation.measure import measured
from phi3_mlflow.evaluation.sets import Sets
from tests.evaluation.measurements import measurement

FOUND = measurement([True, False])
QUESTION = Question.model_validate(
    {
        "id": "q",
        "category": "facts",
        "messages": [{"role": "user", "content": "?"}],
        "check": {"kind": "exact", "value": "yes"},
    }
)
TEXTS = [HeldoutText(id="t", text="Once upon a time.")]
SAME: dict[str, Any] = {
    "content": "ab" * 32,
    "reference_digest": "cd" * 32,
    "sets": Sets([QUESTION], TEXTS),
    "window": 64,
}


@pytest.fixture
def again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Measures with changes; says whether it was there already."""

    def fake(model_uri: str, **given: Any) -> Any:
        return FOUND

    monkeypatch.setattr(measure, "measure", fake)
    store = StepCache(tmp_path)

    def one_more(model_uri: str = "models:/m/1", **changes: Any) -> bool:
        given = {**SAME, **changes}
        found, was_there = measured(model_uri, reference=tmp_path, store=store, **given)
        assert found == FOUND
        return was_there

    return one_more


def test_the_same_is_found_again_whatever_it_is_called(again: Any) -> None:
    assert [again(), again(), again("models:/other/7")] == [False, True, True]


@pytest.mark.parametrize(
    "change",
    [
        {"content": "ef" * 32},
        {"reference_digest": "ef" * 32},
        {"window": 65},
        {"sets": Sets([QUESTION.model_copy(update={"max_tokens": 65})], TEXTS)},
        {"sets": Sets([QUESTION], [HeldoutText(id="t", text="Once upon a time!")])},
    ],
)
def test_what_differs_is_measured_and_does_not_take_its_place(again: Any, change: Any) -> None:
    again()
    assert [again(**change), again(**change), again()] == [False, True, True]


def test_other_code_or_libraries_measure_again(again: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    again()
    monkeypatch.setattr(
        "phi3_mlflow.artifacts.code_keys.Closure.hashes", lambda closure: {"a.py": "other"}
    )
    assert not again()
    monkeypatch.setattr("importlib.metadata.version", lambda name: "99")
    assert not again()


def test_what_is_not_known_or_wanted_fresh_is_measured_each_time(again: Any) -> None:
    assert [again(content=""), again(content="")] == [False, False]
    assert [again(fresh=True), again(fresh=True), again()] == [False, False, True]


def test_needles_count_as_far_as_they_fit_the_model() -> None:
    needle = Needle.model_validate(
        {
            "id": "n",
            "target_tokens": 1000,
            "depth": 0.5,
            "needle": "The code is 7.",
            "question": "Which code?",
            "check": {"kind": "exact", "value": "7"},
        }
    )
    short, long = (Sets([QUESTION], TEXTS, [needle], context) for context in (1000, 1200))
    assert (len(short.fitting()), len(long.fitting())) == (0, 1)
    assert short.digests() == Sets([QUESTION], TEXTS).digests() != long.digests()


def test_the_code_that_decides_the_figures_counts() -> None:
    counted = closure((measure.__name__,)).modules
    for name in ("answers", "checks", "datasets", "divergence", "logits", "measurement", "items"):
        assert f"phi3_mlflow.evaluation.{name}" in counted
    # The gate and the report only look at the figures.
    assert not {"phi3_mlflow.evaluation.gate", "phi3_mlflow.evaluation.report.build"} & {*counted}
