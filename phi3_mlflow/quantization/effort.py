"""How much work a matrix is when it is quantized by GPTQ, for an honest estimate of the time left.

Counted in millions of multiplications as a product of matrices does them. What is no such product
is put into that unit by what it took on two cores with AVX2: rounding a weight by GPTQ, with the
search for its block's grid, as long as some 4,000; rounding it to nearest as some 300.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from phi3_mlflow.quantization.plan import LinearPlan

BATCH = 4
"""Calibration sequences that go through a layer together."""

SEARCHED = 4000
NEAREST = 300
_MILLION = 1_000_000


def layer_effort(steps: Iterable[LinearPlan], places: int) -> int:
    """The effort of matrices of a layer.

    Args:
        steps: the matrices.
        places: tokens of the calibration texts.
    """
    total = 0
    for step in steps:
        weights = step.rows * step.columns
        total += places * weights
        if step.bits == 8:
            total += NEAREST * weights
        else:
            # Second moments, and three factorizations of that size.
            total += places * step.columns**2 + step.columns**3 + SEARCHED * weights
    return total // _MILLION


def head_effort(step: LinearPlan) -> int:
    """The effort of the head, which no second moments are gathered for."""
    per_weight = NEAREST if step.bits == 8 else SEARCHED // 2
    return step.rows * step.columns * per_weight // _MILLION
