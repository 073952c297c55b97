"""Quantize a checkpoint that is larger than the memory, tensor by tensor.

The result is a checkpoint in GPTQ's format, version 1, which onnxruntime-genai's builder,
transformers (with gptqmodel) and this project's export read.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_mlflow.checkpoints.reader import CheckpointReader, read_config
from phi3_mlflow.checkpoints.writer import CheckpointWriter
from phi3_mlflow.core.progress import Meter, Progress, no_progress
from phi3_mlflow.quantization.plan import CopyPlan, LinearPlan, Plan, make_plan
from phi3_mlflow.quantization.settings import (
    DEFAULT_DAMPING,
    GptqSettings,
    QuantizationSettings,
    RtnSettings,
)

if TYPE_CHECKING:
    import torch

    from phi3_mlflow.quantization.rounding import Rounded

# Weights that are rounded at a time. A megabyte of float32 stays in the processor's cache through
# the search's many passes, which makes it more than twice as fast as chunks that do not fit.
CHUNK_WEIGHTS = 262_144

# What else of a checkpoint belongs to the model; anything not named here stays behind.
COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "LICENSE*",
    "NOTICE*",
)


@dataclass(frozen=True)
class QuantizationReport:
    """What was done.

    Attributes:
        algorithm: as in the settings.
        int4_weights, int8_weights, copied_weights: numbers of weights.
        bytes_in, bytes_out: of tensors read and written.
        seconds: wall time.
        bits_per_weight: of the quantized matrices, scales and zero points counted as stored.
    """

    algorithm: str
    int4_weights: int
    int8_weights: int
    copied_weights: int
    bytes_in: int
    bytes_out: int
    seconds: float
    bits_per_weight: float


def quantize_checkpoint(
    checkpoint: Path,
    out: Path,
    settings: QuantizationSettings,
    progress: Progress = no_progress,
) -> QuantizationReport:
    """Write the quantized checkpoint of a float Phi-3 checkpoint.

    Holds a few tensors at a time (with `gptq` a layer and the calibration texts' activations).
    Equal checkpoint, settings and library versions give equal bytes.

    Args:
        checkpoint: a directory with `config.json` and safetensors files, bf16, fp16 or fp32, in one
            file or many, of architecture `Phi3ForCausalLM`.
        out: the directory to write into; made if it is not there.
        settings: the choices.
        progress: told the bytes of every tensor that is done.

    Raises:
        CheckpointRefused: the checkpoint is no float Phi-3 or is damaged.
        UserError: the settings do not fit the model.
    """
    started = time.monotonic()
    if isinstance(settings, GptqSettings) and settings.backend == "optimum":
        from phi3_mlflow.quantization.optimum_gptq import quantize_with_optimum

        return quantize_with_optimum(checkpoint, out, settings, progress)
    config = read_config(checkpoint)
    reader = CheckpointReader(checkpoint)
    plan = make_plan(config, reader, settings)
    out.mkdir(parents=True, exist_ok=True)
    total = sum(_source_bytes(reader, step) for step in plan.steps)
    with (
        CheckpointWriter(out, plan.announced()) as writer,
        progress(f"quantizing ({settings.algorithm})", total) as meter,
    ):
        if isinstance(settings, GptqSettings):
            from phi3_mlflow.quantization.calibrated import quantize_calibrated

            bytes_out = quantize_calibrated(checkpoint, reader, plan, settings, writer, meter)
        else:
            bytes_out = _quantize_plain(reader, plan, settings, writer, meter)
    write_config(out, config, plan, settings)
    copy_companions(checkpoint, out)
    return make_report(plan, settings, total, bytes_out, time.monotonic() - started)


def write_linear(writer: CheckpointWriter, plan: LinearPlan, rounded: Rounded) -> int:
    """Pack a rounded matrix and write its four tensors; returns the bytes."""
    from phi3_mlflow.quantization.packing import pack_gptq_weight, pack_gptq_zeros

    qweight = pack_gptq_weight(rounded.codes, plan.bits)
    qzeros = pack_gptq_zeros(rounded.zeros, plan.bits)
    return _write_packed(writer, plan, qweight, qzeros, rounded.scales)


def _quantize_plain(
    reader: CheckpointReader,
    plan: Plan,
    settings: QuantizationSettings,
    writer: CheckpointWriter,
    meter: Meter,
) -> int:
    import torch

    from phi3_mlflow.quantization import rounding

    rounder = rounding.rtn if isinstance(settings, RtnSettings) else rounding.k_quant
    bytes_out = 0
    with torch.inference_mode():
        for step in plan.steps:
            if isinstance(step, CopyPlan):
                bytes_out += copy_tensor(reader, step, writer, meter)
            else:
                bytes_out += stream_linear(reader, step, rounder, writer, meter)
    return bytes_out


def stream_linear(
    reader: CheckpointReader,
    plan: LinearPlan,
    rounder: Callable[..., Rounded],
    writer: CheckpointWriter,
    meter: Meter,
) -> int:
    """Round a matrix some rows at a time and write it; returns the bytes."""
    import torch

    from phi3_mlflow.quantization.packing import pack_gptq_weight, pack_gptq_zeros

    per_word = 32 // plan.bits
    qweight = torch.empty((plan.columns // per_word, plan.rows), dtype=torch.int32)
    qzeros = torch.empty((plan.blocks, plan.rows // per_word), dtype=torch.int32)
    scales = torch.empty((plan.rows, plan.blocks), dtype=torch.float32)
    chunk = max(8, CHUNK_WEIGHTS // plan.columns // 8 * 8)
    for start in range(0, plan.rows, chunk):
        stop = min(start + chunk, plan.rows)
        weights = reader.read_float(plan.source, slice(start, stop))
        rounded = rounder(weights, plan.bits, plan.block_size, plan.symmetric)
        qweight[:, start:stop] = pack_gptq_weight(rounded.codes, plan.bits)
        packed_zeros = pack_gptq_zeros(rounded.zeros, plan.bits)
        qzeros[:, start // per_word : stop // per_word] = packed_zeros
        scales[start:stop] = rounded.scales
        meter.advance(weights.numel() * _item_size(reader, plan.source))
    return _write_packed(writer, plan, qweight, qzeros, scales)


def _write_packed(
    writer: CheckpointWriter,
    plan: LinearPlan,
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
) -> int:
    import torch

    g_idx = torch.arange(plan.columns, dtype=torch.int32) // plan.block_size
    return (
        writer.write(f"{plan.name}.qweight", qweight)
        + writer.write(f"{plan.name}.qzeros", qzeros)
        + writer.write(f"{plan.name}.scales", scales.T.contiguous().to(torch.float16))
        + writer.write(f"{plan.name}.g_idx", g_idx)
    )


def copy_tensor(
    reader: CheckpointReader, step: CopyPlan, writer: CheckpointWriter, meter: Meter
) -> int:
    """Copy a tensor as it is; returns its bytes."""
    size = writer.write(step.name, reader.read(step.name))
    meter.advance(size)
    return size


def write_config(
    out: Path, config: dict[str, Any], plan: Plan, settings: QuantizationSettings
) -> None:
    """Write `config.json` with the `quantization_config` that says how to read the tensors.

    Matrices that differ from the model-wide bits and group size are named in `dynamic`, as
    GPTQModel writes it: regular expressions after `+:`, first match wins.
    """
    bits4 = [step for step in plan.linears() if step.bits == 4]
    quantization = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": 4,
        "group_size": settings.block_size,
        "sym": all(step.symmetric for step in bits4),
        "desc_act": False,
        "static_groups": False,
        "true_sequential": True,
        "damp_percent": settings.damping if isinstance(settings, GptqSettings) else DEFAULT_DAMPING,
        "lm_head": True,
        "dynamic": _overrides(plan, settings),
        "meta": {
            "quantizer": "phi3-mlflow",
            "algorithm": settings.algorithm,
            "accuracy_level": settings.accuracy_level,
            "embedding_bits": plan.embedding_bits,
            "shared_embedding": plan.shared_embedding,
        },
    }
    text = json.dumps({**config, "quantization_config": quantization}, indent=2) + "\n"
    (out / "config.json").write_text(text, encoding="utf-8")


def copy_companions(checkpoint: Path, out: Path) -> None:
    """Copy tokenizer, chat template, generation config and licence files."""
    for pattern in COMPANIONS:
        for file in sorted(checkpoint.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, out / file.name)


def _overrides(plan: Plan, settings: QuantizationSettings) -> dict[str, dict[str, int | bool]]:
    groups: dict[tuple[str, int, int], list[int | None]] = {}
    for step in plan.linears():
        if (step.bits, step.block_size) != (4, settings.block_size):
            module = step.name.split(".", 3)[-1]
            groups.setdefault((module, step.bits, step.block_size), []).append(step.layer)
    overrides: dict[str, dict[str, int | bool]] = {}
    for (module, bits, block_size), layers in groups.items():
        if layers == [None]:
            pattern = f"+:{module}"
        else:
            numbers = "|".join(map(str, layers))
            pattern = rf"+:model\.layers\.({numbers})\." + re.escape(module)
        overrides[pattern] = {"bits": bits, "group_size": block_size, "sym": True}
    return overrides


def _item_size(reader: CheckpointReader, name: str) -> int:
    from phi3_mlflow.checkpoints.safetensors_header import DTYPE_BYTES

    return DTYPE_BYTES[reader.entry(name).dtype]


def _source_bytes(reader: CheckpointReader, step: LinearPlan | CopyPlan) -> int:
    return reader.entry(step.source if isinstance(step, LinearPlan) else step.name).nbytes


def make_report(
    plan: Plan, settings: QuantizationSettings, bytes_in: int, bytes_out: int, seconds: float
) -> QuantizationReport:
    """Sum up what a plan has come to."""
    counts = {4: 0, 8: 0}
    packed = 0
    for step in plan.linears():
        counts[step.bits] += step.rows * step.columns
        sizes = {name: tensor.nbytes for name, tensor in step.announced().items()}
        packed += sum(size for name, size in sizes.items() if not name.endswith("g_idx"))
    copied = [step.tensor for step in plan.steps if isinstance(step, CopyPlan)]
    return QuantizationReport(
        algorithm=settings.algorithm,
        int4_weights=counts[4],
        int8_weights=counts[8],
        copied_weights=sum(_numel(tensor.shape) for tensor in copied),
        bytes_in=bytes_in,
        bytes_out=bytes_out,
        seconds=seconds,
        bits_per_weight=packed * 8 / max(1, counts[4] + counts[8]),
    )


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
