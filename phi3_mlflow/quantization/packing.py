"""Pack and unpack the integers of quantized matrices, in the two layouts that meet here.

Everything is for one matrix of N rows (outputs), K columns (inputs) and blocks of g columns:
codes are uint8 (N, K), scales float (N, K/g), zero points uint8 (N, K/g), and a weight is
`scale * (code - zero)`.

GPTQ version 1, as in AutoGPTQ's files (https://github.com/AutoGPTQ/AutoGPTQ,
`nn_modules/qlinear/qlinear_cuda_old.py`): qweight int32 (K/p, N) with p = 32/bits codes of a
column in a word, lowest bits first; qzeros int32 (K/g, N/p) with neighbouring rows in a word, each
stored **minus one**; scales (K/g, N). Version 2 stores zero points as they are, and no key in
older configs tells them apart.

ONNX Runtime's MatMulNBits (https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md):
B uint8 (N, K/g, g*bits/8), lowest bits first; scales (N, K/g); zero points uint8
(N, ceil(K/g*bits/8)), each row padded to whole bytes. The flat shapes are allowed too, but
GatherBlockQuantized, which reads a tied head's tensors, takes these only.
"""

from __future__ import annotations

import torch


def pack_gptq_weight(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes uint8 (N, K) as GPTQ's int32 (K*bits/32, N)."""
    rows, columns = codes.shape
    words = _words(_pack_bytes(codes, bits))  # little-endian: the first code has the lowest bits
    return words.reshape(rows, columns * bits // 32).T.contiguous()


def unpack_gptq_weight(qweight: torch.Tensor, bits: int) -> torch.Tensor:
    """GPTQ's int32 (K*bits/32, N) as codes uint8 (N, K)."""
    rows = qweight.shape[1]
    return _unpack_bytes(_bytes(qweight.T).reshape(rows, -1), bits)


def pack_gptq_zeros(zeros: torch.Tensor, bits: int) -> torch.Tensor:
    """Zero points uint8 (N, B) as GPTQ version 1's int32 (B, N*bits/32); N*bits fills words.

    A zero point 0 is stored as the largest code, being -1 in that many bits.
    """
    stored = (zeros.to(torch.int16) - 1).bitwise_and_(2**bits - 1).to(torch.uint8)
    blocks = zeros.shape[1]
    return _words(_pack_bytes(stored.T.contiguous(), bits)).reshape(blocks, -1)


def unpack_gptq_zeros(qzeros: torch.Tensor, bits: int) -> torch.Tensor:
    """GPTQ version 1's int32 (B, N*bits/32) as zero points uint8 (N, B)."""
    stored = _unpack_bytes(_bytes(qzeros).reshape(qzeros.shape[0], -1), bits)
    return (stored.to(torch.int16) + 1).bitwise_and_(2**bits - 1).to(torch.uint8).T.contiguous()


def pack_ort_weight(codes: torch.Tensor, bits: int, block_size: int) -> torch.Tensor:
    """Codes uint8 (N, K) as MatMulNBits' uint8 (N, K/g, g*bits/8)."""
    rows, columns = codes.shape
    return _pack_bytes(codes, bits).reshape(rows, columns // block_size, block_size * bits // 8)


def unpack_ort_weight(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """MatMulNBits' uint8 (N, K/g, g*bits/8) as codes uint8 (N, K)."""
    return _unpack_bytes(packed.reshape(packed.shape[0], -1), bits)


def pack_ort_zeros(zeros: torch.Tensor, bits: int) -> torch.Tensor:
    """Zero points uint8 (N, B) as MatMulNBits' uint8 (N, ceil(B*bits/8))."""
    if bits == 4 and zeros.shape[1] % 2:
        zeros = torch.nn.functional.pad(zeros, (0, 1))
    return _pack_bytes(zeros, bits)


def unpack_ort_zeros(packed: torch.Tensor, bits: int, blocks: int) -> torch.Tensor:
    """MatMulNBits' uint8 (N, ceil(B*bits/8)) as zero points uint8 (N, B)."""
    return _unpack_bytes(packed, bits)[:, :blocks].contiguous()


def gptq_weight_to_ort(qweight: torch.Tensor, bits: int, block_size: int) -> torch.Tensor:
    """GPTQ's int32 (K*bits/32, N) as MatMulNBits' uint8 (N, K/g, g*bits/8).

    Both hold a row's codes in the same order, lowest bits first, so it is a transposition of words.
    """
    rows = qweight.shape[1]
    return _bytes(qweight.T).reshape(rows, -1, block_size * bits // 8)


def dequantize(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, block_size: int
) -> torch.Tensor:
    """The weights float32 (N, K) that codes, scales and zero points stand for."""
    rows, columns = codes.shape
    blocks = codes.reshape(rows, columns // block_size, block_size).to(torch.float32)
    weights = (blocks - zeros.to(torch.float32).unsqueeze(2)) * scales.float().unsqueeze(2)
    return weights.reshape(rows, columns)


def _words(packed: torch.Tensor) -> torch.Tensor:
    # Flat first: a dimension of size one has whatever stride, which a view refuses.
    return packed.reshape(-1).view(torch.int32)


def _bytes(words: torch.Tensor) -> torch.Tensor:
    return words.contiguous().reshape(-1).view(torch.uint8)


def _pack_bytes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    if bits == 8:
        return codes.contiguous()
    return (codes[:, 0::2] | (codes[:, 1::2] << 4)).contiguous()


def _unpack_bytes(packed: torch.Tensor, bits: int) -> torch.Tensor:
    if bits == 8:
        return packed.contiguous()
    rows, columns = packed.shape
    codes = torch.empty((rows, columns * 2), dtype=torch.uint8)
    codes[:, 0::2] = packed & 15
    codes[:, 1::2] = packed >> 4
    return codes
