"""Say before a long job starts whether the machine has the memory and the disk for it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from phi3_mlflow.checkpoints.reader import CheckpointReader, read_config
from phi3_mlflow.core.errors import EnvironmentProblem, problem_list
from phi3_mlflow.core.machine import available_memory, free_disk
from phi3_mlflow.layers.room import IN_MEMORY
from phi3_mlflow.quantization.effort import BATCH
from phi3_mlflow.quantization.plan import (
    EMBEDDING,
    CopyPlan,
    LinearPlan,
    QuantizationPlan,
    make_plan,
)
from phi3_mlflow.quantization.settings import GptqSettings, QuantizationSettings

if TYPE_CHECKING:
    from pathlib import Path

# Resident size of Python with torch, transformers, onnx and the builder loaded, measured.
LIBRARIES = 650_000_000
# Copies of a tensor that are alive at once when it is written: as stored, converted, laid out.
_COPIES = 2
_GIB = 2**30


@dataclass(frozen=True)
class Needs:
    """What a job needs, in bytes.

    Attributes:
        memory: resident, at the highest point of quantize and export.
        disk: for the int4 checkpoint and the ONNX directory together.
        onnx: of that, for the ONNX directory.
    """

    memory: int
    disk: int
    onnx: int


def needs(checkpoint: Path, settings: QuantizationSettings) -> Needs:
    """What quantizing and exporting a checkpoint needs.

    Args:
        checkpoint: a float Phi-3 checkpoint; only its config and headers are read.
        settings: the choices.

    Raises:
        CheckpointRefused: the checkpoint is not a float Phi-3.
        UserError: the settings do not fit it.
    """
    config, reader = read_config(checkpoint), CheckpointReader(checkpoint)
    return needs_of(make_plan(config, reader, settings), settings)


def needs_of(plan: QuantizationPlan, settings: QuantizationSettings) -> Needs:
    """What carrying out a plan and exporting the result needs.

    Args:
        plan: what becomes of every tensor.
        settings: the choices.
    """
    written = sum(tensor.nbytes for tensor in plan.announced().values())
    onnx = sum(_onnx_bytes(step, plan) for step in plan.steps)
    memory = LIBRARIES + _COPIES * max(_onnx_bytes(step, plan) for step in plan.steps)
    if isinstance(settings, GptqSettings):
        memory = max(memory, LIBRARIES + _calibration_bytes(plan, settings))
        # Beside what is too much for memory the states are kept, old and new, for a killed run.
        written += 2 * _state_bytes(plan, settings)
        if settings.backend == "optimum":
            weights = sum(step.rows * step.columns for step in plan.linears())
            memory = max(memory, LIBRARIES + 5 * weights)
    return Needs(memory=memory, disk=written + onnx + 32_000_000, onnx=onnx)


def preflight(
    checkpoint: Path,
    settings: QuantizationSettings,
    out_dir: Path,
    *,
    memory_available: int | None = None,
    disk_available: int | None = None,
) -> Needs:
    """Compare what a job needs with what the machine has.

    Args:
        checkpoint: a float Phi-3 checkpoint.
        settings: the choices.
        out_dir: where the outputs will be written; need not exist yet.
        memory_available: bytes; None asks the machine.
        disk_available: bytes; None asks the machine.

    Returns:
        What the job needs.

    Raises:
        EnvironmentProblem: there is too little; the message says how much and what to do.
        CheckpointRefused: the checkpoint is not a float Phi-3.
        UserError: the settings do not fit it.
    """
    needed = needs(checkpoint, settings)
    memory = available_memory() if memory_available is None else memory_available
    disk = free_disk(out_dir) if disk_available is None else disk_available
    problems, ways = [], []
    if memory is not None and memory < needed.memory:
        problems.append(f"memory: {_gib(needed.memory)} needed, {_gib(memory)} available")
        ways.append(
            "fewer calibration_tokens, or algorithm k_quant_mixed, needs less memory"
            if isinstance(settings, GptqSettings)
            else "close other programs, or run on a machine with more memory"
        )
    if disk < needed.disk:
        problems.append(
            f"disk at {out_dir}: {_gib(needed.disk)} needed (int4 checkpoint and ONNX directory), "
            f"{_gib(disk)} free"
        )
        ways.append("free some space, or put PHI3_MLFLOW_CACHE on another disk")
    if problems:
        raise EnvironmentProblem(
            problem_list(
                f"{checkpoint} cannot be quantized on this machine as it is",
                problems,
                "What helps: " + "; ".join(ways) + ".",
            )
        )
    return needed


def _onnx_bytes(step: LinearPlan | CopyPlan, plan: QuantizationPlan) -> int:
    """Bytes of what a step becomes in the ONNX file."""
    if isinstance(step, LinearPlan):
        weights = step.rows * step.columns * step.bits // 8
        scales = step.rows * step.blocks * 4
        return weights + scales + (0 if step.symmetric else step.rows * step.blocks)
    count = math.prod(step.tensor.shape)
    if step.name == EMBEDDING and plan.embedding_bits:
        return 0 if plan.shared_embedding else count
    return count * 4


def _calibration_bytes(plan: QuantizationPlan, settings: GptqSettings) -> int:
    """Bytes for a float32 layer, the states in memory, and rounding or a few texts' activations."""
    layer = [step for step in plan.linears() if step.layer == 0]
    models = 2 if settings.drift_correction else 1
    floats = 4 * sum(step.rows * step.columns for step in layer)
    states = min(_state_bytes(plan, settings), models * IN_MEMORY)
    widest = sorted(step.rows for step in layer)[-1]
    texts = 4 * BATCH * settings.calibration_length * 2 * widest
    # Second moments, ordered, factor and inverse; the weights, ordered, their rest and the codes.
    rounding = max(4 * (4 * step.columns**2 + 4 * step.rows * step.columns) for step in layer)
    return models * floats + states + max(texts, rounding)


def _state_bytes(plan: QuantizationPlan, settings: GptqSettings) -> int:
    """Bytes of the calibration states and of the inputs that are kept within a layer."""
    layer = [step for step in plan.linears() if step.layer == 0]
    hidden, widest = layer[0].columns, max(step.columns for step in layer)
    models = 2 if settings.drift_correction else 1
    return 4 * models * settings.calibration_tokens * (hidden + widest)


def _gib(size: int) -> str:
    return f"{size / _GIB:.1f} GiB"
