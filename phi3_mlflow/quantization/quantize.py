"""Quantize a checkpoint that is larger than the memory, tensor by tensor.

The result is a checkpoint in GPTQ's format, version 1, which onnxruntime-genai's builder,
transformers (with gptqmodel) and this project's export read.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from phi3_mlflow.checkpoints.reader import CheckpointReader, read_config
from phi3_mlflow.checkpoints.writer import CheckpointWriter
from phi3_mlflow.core.progress import Meter, Progress, no_progress
from phi3_mlflow.quantization.calibrated import quantize_calibrated
from phi3_mlflow.quantization.description import copy_companions, write_config
from phi3_mlflow.quantization.matrices import copy_tensor, stream_linear
from phi3_mlflow.quantization.optimum_gptq import quantize_with_optimum
from phi3_mlflow.quantization.plan import CopyPlan, LinearPlan, QuantizationPlan, make_plan
from phi3_mlflow.quantization.report import QuantizationReport, make_report
from phi3_mlflow.quantization.rounding import k_quant, rtn
from phi3_mlflow.quantization.settings import GptqSettings, QuantizationSettings, RtnSettings

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from phi3_mlflow.rows.texts import Conversation


def quantize_checkpoint(
    checkpoint: Path,
    out: Path,
    settings: QuantizationSettings,
    progress: Progress = no_progress,
    *,
    rows: Sequence[Conversation] = (),
    unfinished: Path | None = None,
) -> QuantizationReport:
    """Write the quantized checkpoint of a float Phi-3 checkpoint.

    Holds a few tensors at a time (with `gptq` a layer and the calibration texts' activations).
    Equal checkpoint, rows, settings and library versions give equal bytes.

    Args:
        checkpoint: a directory with `config.json` and safetensors files, bf16, fp16 or fp32, in one
            file or many, of architecture `Phi3ForCausalLM`.
        out: the directory to write into; made if it is not there.
        settings: the choices.
        progress: told the bytes of every tensor that is done; with `gptq` the share of the work.
        rows: training rows that `gptq` calibrates with besides the texts, as lists of messages.
        unfinished: a folder on the disk of `out`, in which `gptq` keeps what is finished, so that
            the same work goes on there after a kill. None: it begins anew.

    Raises:
        CheckpointRefused: the checkpoint is not a float Phi-3 or is damaged.
        UserError: the settings do not fit the model.
    """
    started = time.monotonic()
    if isinstance(settings, GptqSettings) and settings.backend == "optimum":
        return quantize_with_optimum(checkpoint, out, settings, progress, rows=rows)
    config = read_config(checkpoint)
    reader = CheckpointReader(checkpoint)
    plan = make_plan(config, reader, settings)
    out.mkdir(parents=True, exist_ok=True)
    total = sum(_source_bytes(reader, step) for step in plan.steps)
    if isinstance(settings, GptqSettings):
        bytes_out = quantize_calibrated(
            checkpoint, reader, plan, settings, out, progress, rows, unfinished
        )
    else:
        with (
            CheckpointWriter(out, plan.announced()) as writer,
            progress(f"quantizing ({settings.algorithm})", total) as meter,
        ):
            bytes_out = _quantize_plain(reader, plan, settings, writer, meter)
    write_config(out, config, plan, settings)
    copy_companions(checkpoint, out)
    return make_report(plan, settings, total, bytes_out, time.monotonic() - started)


def _quantize_plain(
    reader: CheckpointReader,
    plan: QuantizationPlan,
    settings: QuantizationSettings,
    writer: CheckpointWriter,
    meter: Meter,
) -> int:
    rounder = rtn if isinstance(settings, RtnSettings) else k_quant
    bytes_out = 0
    with torch.inference_mode():
        for step in plan.steps:
            if isinstance(step, CopyPlan):
                bytes_out += copy_tensor(reader, step, writer, meter)
            else:
                bytes_out += stream_linear(reader, step, rounder, writer, meter)
    return bytes_out


def _source_bytes(reader: CheckpointReader, step: LinearPlan | CopyPlan) -> int:
    return reader.entry(step.source if isinstance(step, LinearPlan) else step.name).nbytes
