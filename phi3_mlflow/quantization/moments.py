"""What calibration gathers of the inputs of a matrix, and how a matrix follows inputs that drift.

Inputs come a part at a time. They are summed up in blocks of a fixed number of rows, so that the
last bit of a sum does not depend on how they were parted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_ROWS = 2048


def second_moments(inputs: Iterable[torch.Tensor]) -> torch.Tensor:
    """The mean of x x^T, float32 (K, K), over inputs that come in parts (..., K)."""
    moments: torch.Tensor | None = None
    count = 0
    for block in _blocks(inputs):
        if moments is None:
            moments = torch.zeros((block.shape[1], block.shape[1]))
        moments.addmm_(block.T, block)
        count += len(block)
    if moments is None:
        raise ValueError("there are no inputs")
    return moments.div_(count)


def correct_drift(
    weights: torch.Tensor,
    inputs: Iterable[torch.Tensor],
    ideal: Iterable[torch.Tensor],
    moments: torch.Tensor,
    damping: float,
    share: float,
) -> torch.Tensor:
    """Adapt a matrix so that for inputs that have drifted it gives what the true ones give.

    The least-squares solution of `adapted @ inputs = weights @ ideal`, held near `weights` by the
    damping (the idea of GPTAQ, https://arxiv.org/abs/2504.02692, taken before the rounding).

    Args:
        weights: float32 (N, K).
        inputs: what the matrix gets in the quantized model, in parts (..., K).
        ideal: what it gets in the full-precision model, in the same parts.
        moments: `second_moments(inputs)`.
        damping: share of the mean diagonal added to the diagonal.
        share: 0 leaves the weights as they are, 1 goes all the way.
    """
    cross, count = torch.zeros_like(moments), 0
    for true, part in zip(_blocks(ideal), _blocks(inputs), strict=True):
        cross.addmm_((true - part).T, part)
        count += len(part)
    damped = moments.clone()
    damped.diagonal().add_(max(damping * float(moments.diagonal().mean()), 1e-12))
    lower, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        return weights
    # adapted = weights + share * weights @ (cross / n) @ damped^-1
    step = torch.cholesky_solve((weights @ cross.div_(count)).T, lower).T
    return weights + share * step


def _blocks(parts: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The rows of all parts in blocks of `_ROWS`; the last is what is left."""
    waiting: list[torch.Tensor] = []
    count = 0
    for part in parts:
        rows = part.reshape(-1, part.shape[-1])
        while count + len(rows) >= _ROWS:
            taken = rows[: _ROWS - count]
            yield torch.cat([*waiting, taken]) if waiting else taken
            rows, waiting, count = rows[len(taken) :], [], 0
        if len(rows):
            waiting.append(rows)
            count += len(rows)
    if waiting:
        yield torch.cat(waiting)
