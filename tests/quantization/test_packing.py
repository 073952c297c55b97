from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3_mlflow.quantization import packing

sizes = st.tuples(
    st.sampled_from([8, 16, 24]),
    st.integers(1, 5),
    st.sampled_from([16, 32]),
    st.sampled_from([4, 8]),
)


def _random(shape: tuple[int, ...], bits: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)


@settings(max_examples=40, deadline=None)
@given(sizes, st.integers(0, 2**31))
def test_gptq_layout_round_trips(size: tuple[int, int, int, int], seed: int) -> None:
    rows, blocks, block_size, bits = size
    codes = _random((rows, blocks * block_size), bits, seed)
    zeros = _random((rows, blocks), bits, seed + 1)
    qweight = packing.pack_gptq_weight(codes, bits)
    qzeros = packing.pack_gptq_zeros(zeros, bits)
    assert qweight.shape == (blocks * block_size * bits // 32, rows)
    assert qzeros.shape == (blocks, rows * bits // 32)
    assert torch.equal(packing.unpack_gptq_weight(qweight, bits), codes)
    assert torch.equal(packing.unpack_gptq_zeros(qzeros, bits), zeros)


@settings(max_examples=40, deadline=None)
@given(sizes, st.integers(0, 2**31))
def test_ort_layout_round_trips(size: tuple[int, int, int, int], seed: int) -> None:
    rows, blocks, block_size, bits = size
    codes = _random((rows, blocks * block_size), bits, seed)
    zeros = _random((rows, blocks), bits, seed + 1)
    packed = packing.pack_ort_weight(codes, bits, block_size)
    assert packed.shape == (rows, blocks, block_size * bits // 8)
    assert torch.equal(packing.unpack_ort_weight(packed, bits), codes)
    packed_zeros = packing.pack_ort_zeros(zeros, bits)
    assert packed_zeros.shape == (rows, (blocks * bits + 7) // 8)
    assert torch.equal(packing.unpack_ort_zeros(packed_zeros, bits, blocks), zeros)


@settings(max_examples=40, deadline=None)
@given(sizes, st.integers(0, 2**31))
def test_gptq_words_are_ort_bytes_transposed(size: tuple[int, int, int, int], seed: int) -> None:
    rows, blocks, block_size, bits = size
    codes = _random((rows, blocks * block_size), bits, seed)
    qweight = packing.pack_gptq_weight(codes, bits)
    expected = packing.pack_ort_weight(codes, bits, block_size)
    assert torch.equal(packing.gptq_weight_to_ort(qweight, bits, block_size), expected)


def test_version_1_stores_zero_points_minus_one() -> None:
    zeros = torch.full((8, 1), 8, dtype=torch.uint8)
    assert packing.pack_gptq_zeros(zeros, 4).item() == 0x77777777
    assert packing.pack_gptq_zeros(zeros * 0, 4).item() == -1
    int8 = packing.pack_gptq_zeros(torch.full((4, 1), 128, dtype=torch.uint8), 8)
    assert int8.item() == 0x7F7F7F7F


def test_the_first_code_of_a_column_has_the_lowest_bits() -> None:
    codes = torch.arange(8, dtype=torch.uint8).repeat(8, 1)
    assert packing.pack_gptq_weight(codes, 4)[0, 0].item() == 0x76543210
    assert packing.pack_ort_weight(codes, 4, 8)[0, 0].tolist() == [0x10, 0x32, 0x54, 0x76]
