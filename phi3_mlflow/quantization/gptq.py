"""Round a matrix column by column, making good each column's error with the columns after it.

GPTQ (Frantar et al., https://arxiv.org/abs/2210.17323): with H the second moments of the inputs,
the error of rounding column j is spread over the columns not yet rounded so that the layer's output
changes least. Columns are taken in the order of falling diagonal of H ("act order"); scales and
zero points of all blocks are searched beforehand ("static groups"), so the columns stay where they
are in the file and no reordering is needed at run time.
"""

from __future__ import annotations

import torch

from phi3_mlflow.quantization.rounding import Rounded, k_quant

# Columns whose error is spread among themselves at once and over the rest in one product.
_PANEL = 128
# Weights whose grid is searched for at once: what that takes stays in the processor's cache.
_SEARCHED = 262_144


def gptq(
    weights: torch.Tensor,
    moments: torch.Tensor,
    bits: int,
    block_size: int,
    symmetric: bool,
    damping: float,
) -> Rounded:
    """Quantize a matrix for inputs of known second moments.

    Args:
        weights: float32 (N, K).
        moments: float32 (K, K), the mean of x x^T over the inputs x.
        bits: 4 or 8.
        block_size: columns that share a scale.
        symmetric: fix the zero points at the middle step.
        damping: share of the mean diagonal that is added to the diagonal.

    Returns:
        Codes (N, K) in the original order of the columns, scales and zeros (N, K/g).
    """
    diagonal = moments.diagonal()
    grid = _grid(weights, bits, block_size, symmetric, diagonal.clamp_min(1e-12))
    order = torch.argsort(diagonal, descending=True, stable=True)
    factor = _inverse_factor(moments, order, damping)
    group = order // block_size
    weights = weights[:, order]
    codes = torch.empty(weights.shape, dtype=torch.uint8)
    columns, top = weights.shape[1], 2**bits - 1
    for start in range(0, columns, _PANEL):
        stop = min(start + _PANEL, columns)
        panel, inner = weights[:, start:stop].clone(), factor[start:stop, start:stop]
        errors = torch.empty_like(panel)
        for j in range(stop - start):
            scale = grid.scales[:, group[start + j]]
            zero = grid.zeros[:, group[start + j]].float()
            code = torch.round(panel[:, j] / scale).add_(zero).clamp_(0, top)
            codes[:, order[start + j]] = code.to(torch.uint8)
            error = (panel[:, j] - scale * (code - zero)) / inner[j, j]
            panel[:, j:] -= torch.outer(error, inner[j, j:])
            errors[:, j] = error
        weights[:, stop:] -= errors @ factor[start:stop, stop:]
    return Rounded(codes, grid.scales, grid.zeros)


def _grid(
    weights: torch.Tensor, bits: int, block_size: int, symmetric: bool, importance: torch.Tensor
) -> Rounded:
    """The scales and zero points of all blocks; a few rows at a time, for the search is greedy."""
    rows = max(1, _SEARCHED // weights.shape[1])
    parts = [
        k_quant(part, bits, block_size, symmetric, importance)
        for part in torch.split(weights, rows)
    ]
    scales = torch.cat([part.scales for part in parts])
    return Rounded(torch.empty(0), scales, torch.cat([part.zeros for part in parts]))


def _inverse_factor(moments: torch.Tensor, order: torch.Tensor, damping: float) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of the damped moments, columns in an order.

    At the widest matrix of a large model each of these is hundreds of megabytes, so none of them
    is held longer than it is needed.
    """
    for attempt in range(6):
        damped = moments[order][:, order]
        mean = float(damped.diagonal().mean())
        if mean <= 0:
            break
        damped.diagonal().add_(damping * mean * 10**attempt)
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped
        if int(failed) == 0:
            inverse = torch.cholesky_inverse(lower)
            del lower
            upper: torch.Tensor
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if int(failed) == 0:
                return upper
    return torch.eye(moments.shape[0])
