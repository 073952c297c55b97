from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3_mlflow.evaluation.statistics import mcnemar, paired_ratio, quantile, wilson


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    # Worked out with scipy.stats.binomtest(...).proportion_ci(method="wilson").
    [(8, 10, 0.49016, 0.94332), (0, 10, 0.0, 0.27753), (10, 10, 0.72247, 1.0)],
)
def test_wilson_agrees_with_published_values(right, total, low, high) -> None:
    found = wilson(right, total)
    assert found.low == pytest.approx(low, abs=1e-4)
    assert found.high == pytest.approx(high, abs=1e-4)


@given(st.integers(1, 500), st.data())
def test_an_interval_holds_its_share_and_stays_between_0_and_1(total: int, data) -> None:
    found = wilson(data.draw(st.integers(0, total)), total)
    assert 0 <= found.low <= found.value + 1e-12
    assert found.value - 1e-12 <= found.high <= 1


@pytest.mark.parametrize(
    ("one", "other", "p"), [(0, 0, 1.0), (5, 5, 1.0), (0, 5, 0.0625), (1, 9, 0.021484375)]
)
def test_mcnemar_is_the_exact_binomial_test(one: int, other: int, p: float) -> None:
    assert mcnemar(one, other) == pytest.approx(p)
    assert mcnemar(other, one) == pytest.approx(p)


def test_pairing_finds_a_small_difference_in_much_noise() -> None:
    import numpy as np

    random = np.random.default_rng(1)
    first = random.normal(10, 5, size=200)  # items differ by far more than the models do
    second = first + 0.1 + random.normal(0, 0.05, size=200)
    found = paired_ratio(first.tolist(), second.tolist())
    assert 0.08 < found.low < found.value < found.high < 0.12
    assert paired_ratio(first.tolist(), second.tolist()) == found  # the seed is fixed


def test_weights_are_places() -> None:
    found = paired_ratio([10.0, 0.0], [12.0, 0.0], [1, 3])
    assert found.value == pytest.approx(0.5)


def test_quantiles() -> None:
    assert quantile([1.0, 2.0, 3.0], 0.5) == 2
    assert quantile([], 0.5) == 0
