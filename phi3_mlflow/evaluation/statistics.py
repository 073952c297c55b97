"""Uncertainty: intervals for shares, and paired comparisons of two models on the same items.

Everything is deterministic: resampling starts from a fixed seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

LEVEL = 0.95
_Z = 1.959963984540054  # two-sided quantile of the normal distribution for LEVEL
_SEED = 20240611
_RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """A value and the bounds that hold it with 95 % confidence."""

    value: float
    low: float
    high: float


def wilson(right: int, total: int) -> Interval:
    """Wilson's score interval for a share (E. B. Wilson, 1927); holds for few items and at 0 and 1.

    Args:
        right, total: counts; a total of 0 says nothing, so the interval is all of [0, 1].
    """
    if not total:
        return Interval(0.0, 0.0, 1.0)
    share, z2 = right / total, _Z**2
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


def mcnemar(only_first: int, only_second: int) -> float:
    """McNemar's exact test on the items that one of two got right and the other did not.

    Returns:
        The two-sided p-value: how likely so uneven a split is when both are equally good.
    """
    total = only_first + only_second
    if not total:
        return 1.0
    tail = sum(math.comb(total, k) for k in range(min(only_first, only_second) + 1)) / 2**total
    return min(1.0, 2 * tail)


def paired_ratio(
    first: Sequence[float], second: Sequence[float], weights: Sequence[float] | None = None
) -> Interval:
    """The difference of two weighted means, second minus first, by a paired bootstrap over items.

    Args:
        first, second: sums an item (such as the NLL of a text) of each model, aligned.
        weights: the number of places an item sums over; default: 1 each.

    Returns:
        sum(second - first) / sum(weights) with its percentile interval.
    """
    import numpy as np

    size = np.ones(len(first)) if weights is None else np.asarray(weights, float)
    difference = np.asarray(second, float) - np.asarray(first, float)
    drawn = _draws(len(difference))
    means = (drawn @ difference) / (drawn @ size)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(difference.sum() / size.sum()), float(low), float(high))


def _draws(items: int) -> np.ndarray:
    """How often each item is drawn in each resample: (resamples, items) float64."""
    import numpy as np

    random = np.random.default_rng(_SEED)
    return random.multinomial(items, np.full(items, 1 / items), size=_RESAMPLES).astype(float)


def quantile(values: Sequence[float], share: float) -> float:
    """The quantile of some values, between two of them linearly; 0 when there are none."""
    import numpy as np

    return float(np.quantile(values, share)) if len(values) else 0.0
