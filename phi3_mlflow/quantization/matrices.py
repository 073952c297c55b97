"""Read, round, pack and write the tensors of a checkpoint, a part of a matrix at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from phi3_mlflow.checkpoints.safetensors_header import DTYPE_BYTES
from phi3_mlflow.quantization.packing import pack_gptq_weight, pack_gptq_zeros

if TYPE_CHECKING:
    from collections.abc import Callable

    from phi3_mlflow.checkpoints.reader import CheckpointReader
    from phi3_mlflow.checkpoints.writer import CheckpointWriter
    from phi3_mlflow.core.progress import Meter
    from phi3_mlflow.quantization.plan import CopyPlan, LinearPlan
    from phi3_mlflow.quantization.rounding import Rounded

# Weights that are rounded together. A megabyte of float32 stays in the processor's cache through
# the search's many passes, which makes it more than twice as fast as chunks that do not fit.
CHUNK_WEIGHTS = 262_144


def write_linear(writer: CheckpointWriter, plan: LinearPlan, rounded: Rounded) -> int:
    """Pack a rounded matrix and write its four tensors.

    Args:
        writer: gets the tensors, in GPTQ's layout.
        plan: what the matrix becomes.
        rounded: its codes, scales and zero points.

    Returns:
        The bytes written.
    """
    qweight = pack_gptq_weight(rounded.codes, plan.bits)
    qzeros = pack_gptq_zeros(rounded.zeros, plan.bits)
    return _write_packed(writer, plan, qweight, qzeros, rounded.scales)


def stream_linear(
    reader: CheckpointReader,
    plan: LinearPlan,
    rounder: Callable[..., Rounded],
    writer: CheckpointWriter,
    meter: Meter,
) -> int:
    """Round a matrix a few rows at a time and write it.

    Args:
        reader: holds the float matrix (N, K).
        plan: what it becomes.
        rounder: `rtn` or `k_quant`, called with float32 rows, bits, block size and symmetry.
        writer: gets the four tensors, in GPTQ's layout.
        meter: told the bytes of the source that are done.

    Returns:
        The bytes written.
    """
    per_word = 32 // plan.bits
    qweight = torch.empty((plan.columns // per_word, plan.rows), dtype=torch.int32)
    qzeros = torch.empty((plan.blocks, plan.rows // per_word), dtype=torch.int32)
    scales = torch.empty((plan.rows, plan.blocks), dtype=torch.float32)
    chunk = max(8, CHUNK_WEIGHTS // plan.columns // 8 * 8)
    item_size = DTYPE_BYTES[reader.entry(plan.source).dtype]
    for start in range(0, plan.rows, chunk):
        stop = min(start + chunk, plan.rows)
        weights = reader.read_float(plan.source, slice(start, stop))
        rounded = rounder(weights, plan.bits, plan.block_size, plan.symmetric)
        qweight[:, start:stop] = pack_gptq_weight(rounded.codes, plan.bits)
        packed_zeros = pack_gptq_zeros(rounded.zeros, plan.bits)
        qzeros[:, start // per_word : stop // per_word] = packed_zeros
        scales[start:stop] = rounded.scales
        meter.advance(weights.numel() * item_size)
    return _write_packed(writer, plan, qweight, qzeros, scales)


def copy_tensor(
    reader: CheckpointReader, step: CopyPlan, writer: CheckpointWriter, meter: Meter | None = None
) -> int:
    """Copy a tensor as it is.

    Returns:
        The bytes written.
    """
    size = writer.write(step.name, reader.read(step.name))
    if meter is not None:
        meter.advance(size)
    return size


def _write_packed(
    writer: CheckpointWriter,
    plan: LinearPlan,
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
) -> int:
    g_idx = torch.arange(plan.columns, dtype=torch.int32) // plan.block_size
    return (
        writer.write(f"{plan.name}.qweight", qweight)
        + writer.write(f"{plan.name}.qzeros", qzeros)
        + writer.write(f"{plan.name}.scales", scales.T.contiguous().to(torch.float16))
        + writer.write(f"{plan.name}.g_idx", g_idx)
    )
