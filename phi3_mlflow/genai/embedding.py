"""Quantize an embedding for GatherBlockQuantized, while the ONNX file is being written."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from phi3_mlflow.genai.lazy import LazyArray
from phi3_mlflow.quantization import packing
from phi3_mlflow.quantization.matrices import CHUNK_WEIGHTS
from phi3_mlflow.quantization.rounding import Rounded, k_quant

if TYPE_CHECKING:
    from phi3_mlflow.checkpoints.reader import CheckpointReader


def quantized_embedding(
    reader: CheckpointReader, name: str, bits: int, block_size: int
) -> dict[str, LazyArray]:
    """The three inputs of GatherBlockQuantized for a float embedding (V, H).

    int4 has a zero point per block; int8 is symmetric, its zero points all the middle step.

    Args:
        reader: the checkpoint.
        name: the embedding's tensor.
        bits: 4 or 8.
        block_size: weights of a row that share a scale; divides H.

    Returns:
        `qweight` uint8 (V, H*bits/8), `scales` float32 (V, H/g) and `qzeros`
        uint8 (V, ceil(H/g*bits/8)), each made when it is written.
    """
    rows, columns = reader.shape(name)
    blocks = columns // block_size

    def rounded() -> Rounded:
        codes = torch.empty((rows, columns), dtype=torch.uint8)
        scales = torch.empty((rows, blocks))
        zeros = torch.empty((rows, blocks), dtype=torch.uint8)
        chunk = max(1, CHUNK_WEIGHTS // columns)
        for start in range(0, rows, chunk):
            part = slice(start, min(start + chunk, rows))
            weights = reader.read_float(name, part)
            codes[part], scales[part], zeros[part] = k_quant(weights, bits, block_size, bits == 8)
        return Rounded(codes, scales, zeros)

    return {
        "qweight": LazyArray(
            (rows, columns * bits // 8),
            "uint8",
            lambda: packing.pack_ort_weight(rounded().codes, bits, columns).reshape(rows, -1),
        ),
        "scales": LazyArray((rows, blocks), "float32", lambda: rounded().scales),
        "qzeros": LazyArray(
            (rows, (blocks * bits + 7) // 8),
            "uint8",
            lambda: packing.pack_ort_zeros(rounded().zeros, bits),
        ),
    }
