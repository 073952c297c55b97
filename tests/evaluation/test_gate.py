from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3_mlflow.evaluation.gate import judge
from phi3_mlflow.profiles import Bound

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
    verdict = judge({} if found is None else {"kl_mean": found}, {"kl_mean": bound})
    assert not verdict.passed
    assert verdict.reasons == [reason]


@given(numbers, numbers, numbers)
def test_it_passes_exactly_between_the_bounds(found: float, one: float, other: float) -> None:
    low, high = sorted((one, other))
    verdict = judge({"accuracy": found}, {"accuracy": Bound(min=low, max=high)})
    assert verdict.passed == (low <= found <= high)
    assert len(verdict.checks) == 2
    assert len(verdict.reasons) == (not verdict.passed)


def test_without_thresholds_everything_passes() -> None:
    assert judge({"accuracy": 0.0}, {}).passed
