from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3_mlflow.quantization.packing import dequantize
from phi3_mlflow.quantization.rounding import SMALLEST_SCALE, Rounded, k_quant, rtn

ROUNDINGS = {"rtn": rtn, "k_quant": k_quant}


def _weights(seed: int, spread: float = 1.0, rows: int = 8, columns: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((rows, columns), generator=generator) * spread


def _error(weights: torch.Tensor, rounded: Rounded, block_size: int) -> float:
    return float((dequantize(*rounded, block_size) - weights).square().mean())


@pytest.mark.parametrize("name", ROUNDINGS)
@pytest.mark.parametrize("symmetric", [True, False])
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    spread=st.sampled_from([1e-6, 1e-3, 1.0, 1e3]),
    bits=st.sampled_from([4, 8]),
    block_size=st.sampled_from([16, 32, 64]),
)
def test_every_weight_is_within_a_step(
    name: str, symmetric: bool, seed: int, spread: float, bits: int, block_size: int
) -> None:
    weights = _weights(seed, spread)
    rounded = ROUNDINGS[name](weights, bits, block_size, symmetric)
    assert rounded.codes.dtype == rounded.zeros.dtype == torch.uint8
    assert int(rounded.codes.max()) < 2**bits
    assert torch.equal(rounded.scales, rounded.scales.half().float())
    error = (dequantize(*rounded, block_size) - weights).reshape(8, -1, block_size).abs().amax(2)
    # Symmetric steps end one short of the opposite extreme; a searched scale may cut both ends.
    steps = 4.0 if name == "k_quant" else 1.02
    assert bool((error <= steps * rounded.scales.abs().clamp_min(SMALLEST_SCALE)).all())
    if symmetric:
        assert bool((rounded.zeros == 2 ** (bits - 1)).all())


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_search_beats_rounding_to_nearest(symmetric: bool) -> None:
    weights = _weights(1, rows=64, columns=256)
    nearest = _error(weights, rtn(weights, 4, 32, symmetric), 32)
    assert _error(weights, k_quant(weights, 4, 32, symmetric), 32) < 0.95 * nearest


def test_importance_moves_the_error_to_columns_that_count_less() -> None:
    weights = _weights(2, rows=128, columns=64)
    importance = torch.ones(64)
    importance[::4] = 100.0
    plain, weighted = (k_quant(weights, 4, 32, False, i) for i in (None, importance))

    def important_error(rounded: Rounded) -> float:
        return float((dequantize(*rounded, 32) - weights)[:, ::4].square().mean())

    assert important_error(weighted) < important_error(plain)


@pytest.mark.parametrize("name", ROUNDINGS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [0.0, 0.7, -0.7, 1e-8])
def test_constant_blocks_keep_their_value(name: str, symmetric: bool, value: float) -> None:
    weights = torch.full((8, 32), value)
    rounded = ROUNDINGS[name](weights, 4, 32, symmetric)
    assert bool(torch.isfinite(rounded.scales).all())
    torch.testing.assert_close(dequantize(*rounded, 32), weights, atol=4e-4, rtol=1e-3)


def test_int8_is_sixteen_times_finer() -> None:
    weights = _weights(3, rows=64, columns=256)
    coarse = _error(weights, rtn(weights, 4, 32, True), 32)
    assert _error(weights, rtn(weights, 8, 32, True), 32) < coarse / 200
