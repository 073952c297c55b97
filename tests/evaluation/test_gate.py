from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3_mlflow.evaluation.gate import Verdict, against_champion, check_thresholds
from phi3_mlflow.evaluation.junit import junit_xml
from phi3_mlflow.evaluation.measurement import Measurement
from phi3_mlflow.evaluation.settings import COMPARED_METRICS, Bound, GateSettings, Margin
from tests.evaluation.measurements import measurement

numbers = st.floats(-1e6, 1e6)


@pytest.mark.parametrize(
    ("found", "bound", "reason"),
    [
        (0.31, Bound(max=0.3), "kl_mean is 0.31, 0.01 above the max 0.3"),
        (0.2, Bound(min=0.3), "kl_mean is 0.2, 0.1 below the min 0.3"),
        (None, Bound(max=0.3), "kl_mean was not measured; wanted <= 0.3"),
        (math.nan, Bound(min=0.3), "kl_mean was not measured; wanted >= 0.3"),
    ],
)
def test_a_failed_threshold_says_by_how_much(found, bound: Bound, reason: str) -> None:
    verdict = check_thresholds({} if found is None else {"kl_mean": found}, {"kl_mean": bound})
    assert not verdict.passed
    assert verdict.reasons == [reason]


@given(numbers, numbers, numbers)
def test_it_passes_exactly_between_the_bounds(found: float, one: float, other: float) -> None:
    low, high = sorted((one, other))
    verdict = check_thresholds({"accuracy": found}, {"accuracy": Bound(min=low, max=high)})
    assert verdict.passed == (low <= found <= high)
    assert len(verdict.checks) == 2
    assert len(verdict.reasons) == (not verdict.passed)


def test_without_thresholds_everything_passes() -> None:
    assert check_thresholds({"accuracy": 0.0}, {}).passed


# --- compared with the champion ---------------------------------------------------------------

MARGINS = {"accuracy": Margin(by=0.05), "kl_mean": Margin(percent=10)}
HALF = [i % 2 == 0 for i in range(200)]
NOISE = np.random.default_rng(3)
TEXTS = tuple(NOISE.uniform(0.05, 0.5, size=12))


def compare(found: Measurement, champion: Measurement, margins=MARGINS) -> Verdict:
    return against_champion(
        check_thresholds(found.metrics, {}), found, champion, margins, "models:/m/1"
    )


def state(verdict: Verdict, metric: str) -> str:
    return next(c.state for c in verdict.comparisons if c.metric == metric)


def test_a_closer_model_replaces_a_champion() -> None:
    better = measurement(HALF, [0.5 * kl for kl in TEXTS])
    verdict = compare(better, measurement(HALF, TEXTS))
    assert state(verdict, "kl_mean") == "better"
    assert verdict.decision == "promote"
    assert "KL divergence" in verdict.why


def test_a_worse_model_is_refused_with_the_reason() -> None:
    worse = measurement([False] * 60 + HALF[60:], TEXTS)
    verdict = compare(worse, measurement(HALF, TEXTS))
    assert verdict.decision == "refuse"
    assert state(verdict, "accuracy") == "worse"
    assert "questions answered right: 35.0%, champion 50.0%" in verdict.reasons[0]
    assert "McNemar" in verdict.reasons[0]


def test_few_questions_lost_by_chance_neither_refuse_nor_promote() -> None:
    flags = HALF[:40]
    luck = [*flags]
    luck[0], luck[2], luck[4], luck[1] = False, False, False, True  # 5 % fewer, 3 against 1
    one, other = measurement(luck, TEXTS), measurement(flags, TEXTS)
    assert state(compare(one, other), "accuracy") == "undecided"
    assert compare(one, other).decision == "keep"
    assert compare(one, other).passed
    assert state(compare(other, one), "accuracy") == "not worse"  # nor is it called better


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_two_equally_good_models_never_refuse_each_other(seed: int) -> None:
    """Differences of no direction: at the usual level, and beyond the margin, nothing is refused
    but the rarest of draws; with these sizes the margin is out of reach altogether."""
    random = np.random.default_rng(seed)
    one = measurement((random.random(60) < 0.5).tolist(), TEXTS)
    flips = random.choice(60, 4, replace=False)
    flags = [a.correct != (i in flips) for i, a in enumerate(one.answers)]
    verdict = compare(measurement(flags, TEXTS), one)
    assert verdict.decision in ("keep", "promote")
    assert state(verdict, "accuracy") != "better"


def test_an_equal_model_that_is_shown_to_be_as_good_may_follow() -> None:
    same = measurement(HALF, TEXTS)
    verdict = compare(same, same)
    assert {c.state for c in verdict.comparisons} == {"not worse"}
    assert verdict.decision == "promote"


def test_too_few_items_are_no_evidence() -> None:
    worse = measurement([False] * 5, [5.0, 5.0])
    verdict = compare(worse, measurement([True] * 5, [0.1, 0.1]))
    assert {c.state for c in verdict.comparisons} == {"undecided"}
    assert verdict.decision == "keep"


def test_a_metric_that_was_not_measured_is_undecided() -> None:
    one = measurement(HALF, TEXTS)
    bare = replace(one, metrics={})
    assert compare(one, bare).decision == "keep"
    assert "was not measured of the champion" in compare(one, bare).comparisons[0].reason


@pytest.mark.parametrize(
    ("size", "expected"), [(0.8e8, "better"), (1e8, "not worse"), (1.2e8, "worse")]
)
def test_a_size_has_no_noise(size: float, expected: str) -> None:
    margins = {"size_bytes": Margin(percent=10)}
    found = measurement(HALF, TEXTS, size_bytes=size)
    assert state(compare(found, measurement(HALF, TEXTS), margins), "size_bytes") == expected


@pytest.mark.parametrize(
    "metric", sorted(set(COMPARED_METRICS) - {"size_bytes", "peak_memory_bytes"})
)
def test_every_metric_that_a_profile_may_name_can_be_compared(metric: str) -> None:
    one = measurement(HALF, TEXTS)
    assert state(compare(one, one, {metric: Margin(percent=1)}), metric) == "not worse"


def test_a_threshold_stands_whatever_the_champion_is_like() -> None:
    better = measurement(HALF, [0.5 * kl for kl in TEXTS])
    verdict = check_thresholds(better.metrics, {"accuracy": Bound(min=0.9)})
    verdict = against_champion(verdict, better, measurement(HALF, TEXTS), MARGINS, "models:/m/1")
    assert verdict.decision == "refuse"


def test_mlflow_agrees_on_thresholds() -> None:
    from mlflow import validate_evaluation_results
    from mlflow.models import EvaluationResult, MetricThreshold
    from mlflow.models.evaluation.validation import ModelValidationFailedException

    for found, passes in ((0.31, False), (0.3, True)):
        limit = {"kl_mean": MetricThreshold(threshold=0.3, greater_is_better=False)}
        assert check_thresholds({"kl_mean": found}, {"kl_mean": Bound(max=0.3)}).passed == passes
        result = EvaluationResult({"kl_mean": found}, {})
        with nullcontext() if passes else pytest.raises(ModelValidationFailedException):
            validate_evaluation_results(limit, result)


def test_the_verdict_as_junit_xml() -> None:
    found, champion = measurement([False] * 100 + HALF[100:], TEXTS), measurement(HALF, TEXTS)
    verdict = check_thresholds(found.metrics, {"accuracy": Bound(min=0.9), "kl_mean": Bound(max=9)})
    verdict = against_champion(verdict, found, champion, MARGINS, "models:/m/1")
    suite = ElementTree.fromstring(junit_xml("models:/m/2 \x00&", verdict).encode())
    assert (suite.get("tests"), suite.get("failures")) == ("4", "2")
    cases = {case.get("name"): case for case in suite}
    assert cases["accuracy >= 0.9"].find("failure").text.startswith("accuracy is 0.25")
    assert cases["accuracy not worse"].find("failure") is not None
    assert cases["kl_mean not worse"].find("failure") is None


# --- nothing checked, and nothing asked for ---------------------------------------------------


def by_default(found: Measurement) -> Verdict:
    return check_thresholds(found.metrics, GateSettings().thresholds)


def test_a_profile_without_thresholds_still_refuses_what_is_broken() -> None:
    sound = measurement(HALF, TEXTS)
    assert by_default(sound).passed
    assert by_default(sound).gate == "passed"
    looping = replace(sound, metrics={**sound.metrics, "repetition_rate": 0.6})
    endless = replace(sound, metrics={**sound.metrics, "endless_rate": 1.0})
    for broken in (looping, endless, measurement(HALF, [3.0] * 12)):
        assert (by_default(broken).decision, by_default(broken).gate) == ("refuse", "failed")


@pytest.mark.parametrize("off", [True, False])
def test_where_nothing_was_checked_the_verdict_says_so(off: bool) -> None:
    verdict = Verdict((), off=off)
    assert (verdict.gate, verdict.decision, verdict.passed) == ("not gated", "promote", True)
    assert verdict.why.startswith("not gated: ")
    assert verdict.to_dict()["gate"] == "not gated"
    suite = ElementTree.fromstring(junit_xml("models:/m/2", verdict).encode())
    assert (suite.get("tests"), suite.get("skipped")) == ("1", "1"), "no suite is green for nothing"
    noted = replace(verdict, note="it is the same model as the champion")
    assert (noted.gate, noted.decision) == ("not gated", "keep")
    assert noted.why.startswith("not gated; it is the same model")


@pytest.mark.parametrize("written", [False, "off", {"off": True}])
def test_the_gate_is_switched_off_in_a_word(written) -> None:
    assert GateSettings.model_validate(written).off


def test_what_is_off_checks_nothing() -> None:
    with pytest.raises(ValueError, match="off: true checks nothing; leave out off, or thresholds"):
        GateSettings.model_validate({"off": True, "thresholds": {"kl_mean": {"max": 1}}})
    with pytest.raises(ValueError, match="GateSettings"):
        GateSettings.model_validate(True)
