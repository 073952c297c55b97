"""Turn a matrix of weights into codes, scales and zero points, block by block.

A weight becomes `scale * (code - zero)`: codes are integers of `bits` bits, a block of neighbouring
weights of one row shares a scale and a zero point. Scales are rounded to float16 before the codes
are chosen, because that is how they are stored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

# Smaller scales are subnormal in float16 and lose their precision; a block that needs one holds
# weights below 1e-3, and half a step of this size changes nothing.
SMALLEST_SCALE = 2.0**-14
_LARGEST_SCALE = 65504.0


class Rounded(NamedTuple):
    """A quantized matrix of N rows, K columns and blocks of g: what `packing` packs.

    Attributes:
        codes: uint8 (N, K).
        scales: float32 (N, K/g), each value one that float16 holds; may be negative.
        zeros: uint8 (N, K/g).
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor


Rounding = Callable[[torch.Tensor, int, int, bool, torch.Tensor | None], Rounded]


def rtn(
    weights: torch.Tensor,
    bits: int,
    block_size: int,
    symmetric: bool,
    importance: torch.Tensor | None = None,
) -> Rounded:
    """Round to the nearest step; the scale follows from the block's extremes.

    Symmetric: the weight of largest magnitude gets the lowest code, so that all `2**bits` steps
    are in use, and its sign becomes the scale's (as in ggml's Q4_0 and ONNX Runtime's default).

    Args:
        weights: float32 (N, K); K is a multiple of `block_size`.
        bits: 4 or 8.
        block_size: weights that share a scale.
        symmetric: fix the zero point at the middle step.
        importance: not used; rounding to nearest weighs nothing.
    """
    del importance
    blocks = _blocked(weights, block_size)
    if symmetric:
        scales, zeros = _symmetric_start(blocks, bits)
    else:
        low, high = _extremes(blocks)
        scales = _storable((high - low) / (2**bits - 1))
        zeros = torch.round(-low / scales).clamp_(0, 2**bits - 1)
    return _assign(blocks, scales, zeros, bits)


def k_quant(
    weights: torch.Tensor,
    bits: int,
    block_size: int,
    symmetric: bool,
    importance: torch.Tensor | None = None,
) -> Rounded:
    """Search each block's scale and zero point for the least weighted squared error.

    The search is llama.cpp's for its K-quants: try steps somewhat finer and coarser than the
    extremes ask for, assign codes, fit the scale to the codes by weighted least squares, keep the
    best (`make_qx_quants` and `make_qkx2_quants` in
    https://github.com/ggml-org/llama.cpp/blob/36667c8edcded08063ed51c7d57e9e086bbfc903/ggml/src/ggml-quants.c).
    There the minimum of a block is a float; here zero points are whole numbers, so they are
    searched along with the scales instead of rounded afterwards.

    Args:
        weights: float32 (N, K); K is a multiple of `block_size`.
        bits: 4 or 8; int8 is rounded to nearest, where nothing is left to search for.
        block_size: weights that share a scale.
        symmetric: fix the zero point at the middle step.
        importance: float32 (K,), how much the error of a column counts (mean squared input);
            None takes llama.cpp's guess from the weights themselves.
    """
    if bits == 8:
        return rtn(weights, bits, block_size, symmetric)
    blocks = _blocked(weights, block_size)
    weighting = _weighting(blocks, importance)
    return _search(blocks, weighting, bits, symmetric)


def _search(blocks: torch.Tensor, weighting: torch.Tensor, bits: int, symmetric: bool) -> Rounded:
    top = 2**bits - 1
    weighted = weighting * blocks
    best_gain = torch.full(blocks.shape[:2], -1.0)
    best_scales = torch.ones(blocks.shape[:2])
    best_zeros = torch.full(blocks.shape[:2], float(2 ** (bits - 1)))
    for scales, zeros in _candidates(blocks, bits, symmetric):
        steps = torch.round(blocks / scales.unsqueeze(2))
        floor = -zeros.unsqueeze(2)
        steps = torch.minimum(torch.maximum(steps, floor), floor + top)
        cross = (weighted * steps).sum(2)
        square = (weighting * steps * steps).sum(2)
        # With the best scale cross/square the error is sum(w x^2) - cross^2/square.
        gain = torch.where(square > 0, cross * cross / square.clamp_min(1e-30), 0.0)
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        fitted = torch.where(square > 0, cross / square.clamp_min(1e-30), scales)
        best_scales = torch.where(better, fitted, best_scales)
        best_zeros = torch.where(better, zeros, best_zeros)
    return _assign(blocks, _storable(best_scales), best_zeros, bits)


def _candidates(
    blocks: torch.Tensor, bits: int, symmetric: bool
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    top = 2**bits - 1
    if symmetric:
        start, zeros = _symmetric_start(blocks, bits)
        half = float(2 ** (bits - 1))
        stretches = [half / (half + 0.1 * step) for step in range(-9, 10)]
        flipped = [stretch * (half / (half - 1)) * -1 for stretch in (1.0, 0.97)]
        return [(start * stretch, zeros) for stretch in stretches + flipped]
    low, high = _extremes(blocks)
    span = (high - low).clamp_min(SMALLEST_SCALE)
    pairs = []
    for step in range(-8, 9, 2):
        scales = span / (top + 0.2 * step)
        exact = -low / scales
        down = torch.floor(exact).clamp_(0, top)
        pairs += [(scales, down), (scales, (down + 1).clamp_(0, top))]
    return pairs


def _weighting(blocks: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    mean_square = (blocks * blocks).mean(2, keepdim=True)
    if importance is None:
        return torch.sqrt(mean_square) + blocks.abs() + 1e-12
    columns = importance.reshape(1, blocks.shape[1], blocks.shape[2])
    return columns * torch.sqrt(mean_square + blocks * blocks) + 1e-12


def _symmetric_start(blocks: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = blocks.amin(2), blocks.amax(2)
    extreme = torch.where(high > -low, high, low)
    half = 2 ** (bits - 1)
    return _storable(extreme / -half), torch.full_like(extreme, float(half))


def _extremes(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # Zero must lie within, so that a zero point exists among the codes.
    return blocks.amin(2).clamp_max(0), blocks.amax(2).clamp_min(0)


def _storable(scales: torch.Tensor) -> torch.Tensor:
    size = scales.abs().clamp(SMALLEST_SCALE, _LARGEST_SCALE)
    return torch.where(scales < 0, -size, size).to(torch.float16).to(torch.float32)


def _assign(blocks: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int) -> Rounded:
    codes = torch.round(blocks / scales.unsqueeze(2)).add_(zeros.unsqueeze(2))
    codes = codes.clamp_(0, 2**bits - 1).to(torch.uint8)
    return Rounded(codes.reshape(codes.shape[0], -1), scales, zeros.to(torch.uint8))


def _blocked(weights: torch.Tensor, block_size: int) -> torch.Tensor:
    return weights.reshape(weights.shape[0], -1, block_size)
