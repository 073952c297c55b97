"""Uncertainty: intervals for shares, and paired comparisons of two models on the same items.

Everything is deterministic: resampling starts from a fixed seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]

LEVEL = 0.95
_SEED = 20240611
_RESAMPLES = 10_000
_RESAMPLES_AT_ONCE = 1_000


@dataclass(frozen=True)
class Interval:
    """A value and the bounds that hold it with 95 % confidence."""

    value: float
    low: float
    high: float


def wilson(right: int, total: int) -> Interval:
    """Wilson's score interval for a share (E. B. Wilson, 1927); holds for few items and at 0 and 1.

    Args:
        right: how many of the items count.
        total: how many items there are; 0 says nothing, so the interval is all of [0, 1].
    """
    from scipy.stats import binomtest

    if not total:
        return Interval(0.0, 0.0, 1.0)
    found = binomtest(right, total).proportion_ci(LEVEL, method="wilson")
    return Interval(right / total, float(found.low), float(found.high))


def mcnemar(only_first: int, only_second: int) -> float:
    """McNemar's exact test on the items that one of two got right and the other did not.

    Returns:
        The two-sided p-value: how likely so uneven a split is when both are equally good.
    """
    from scipy.stats import binomtest

    total = only_first + only_second
    return float(binomtest(only_first, total, 0.5).pvalue) if total else 1.0


def paired_ratio(
    first: Sequence[float], second: Sequence[float], weights: Sequence[float] | None = None
) -> Interval:
    """The difference of two weighted means, second minus first, by a paired bootstrap over items.

    Args:
        first: one sum per item (such as the NLL of a text) of one model; two items at least.
        second: the same of the other model, aligned.
        weights: the number of places an item sums over; default: 1 each.

    Returns:
        sum(second - first) / sum(weights) with its percentile interval.
    """
    import numpy as np
    from scipy.stats import bootstrap

    size = np.ones(len(first)) if weights is None else np.asarray(weights, float)
    difference = np.asarray(second, float) - np.asarray(first, float)

    def ratio(sums: FloatArray, sizes: FloatArray, axis: int = -1) -> FloatArray:
        return np.asarray(sums.sum(axis) / sizes.sum(axis), float)

    found = bootstrap(
        (difference, size),
        ratio,
        n_resamples=_RESAMPLES,
        batch=_RESAMPLES_AT_ONCE,
        paired=True,
        vectorized=True,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(_SEED),
    ).confidence_interval
    return Interval(float(difference.sum() / size.sum()), float(found.low), float(found.high))


def quantile(values: Sequence[float], share: float) -> float:
    """The quantile of some values, between two of them linearly; 0 when there are none."""
    import numpy as np

    return float(np.quantile(values, share)) if len(values) else 0.0
