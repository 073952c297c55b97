"""How much memory a training run takes, known before the model is loaded.

The weights; the adapter with its gradients and the two moments of AdamW; and what the forward pass
leaves for the backward pass: of every matrix its input and output, as much again for norms,
rotations and the activation function, and the logits. benchmarks/train_memory.py compares it with
what is measured.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from phi3_mlflow.checkpoints.reader import CheckpointReader
from phi3_mlflow.core.errors import EnvironmentProblem
from phi3_mlflow.core.machine import available_memory
from phi3_mlflow.training.lora import adapted_tensors

if TYPE_CHECKING:
    from pathlib import Path

    from phi3_mlflow.training.settings import TrainSettings

_LIBRARIES = 1_000_000_000  # bytes
_AROUND = 1.5  # times what the matrices of a layer take in and give is kept of its forward pass
_HEADS = 3.0  # times the logits
_FLOAT = 4  # bytes
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that a process which trains takes at most, in float32 on a CPU.

    Attributes:
        weights: of the model.
        adapter: its weights, gradients and moments.
        activations: kept for the backward pass of one batch.
    """

    weights: int
    adapter: int
    activations: int

    @property
    def total(self) -> int:
        """All of it, with the libraries."""
        return _LIBRARIES + self.weights + self.adapter + self.activations


def training_memory(
    checkpoint: Path, settings: TrainSettings, longest: int, *, layers: int | None = None
) -> TrainingMemory:
    """Estimate what a training run takes.

    Args:
        checkpoint: that is trained; only headers are read.
        settings: the choices.
        longest: tokens of the longest row, or of the longest sequence of packed ones.
        layers: of a model with so many layers of this shape; None: as many as the checkpoint has.
    """
    reader = CheckpointReader(checkpoint)
    shapes = {name: reader.shape(name) for name in reader}
    inner = {name: shape for name, shape in shapes.items() if _LAYER.match(name)}
    there = len({found[1] for name in inner if (found := _LAYER.match(name))})
    count = layers or there
    scale = count / there
    adapted = adapted_tensors(reader, settings.target_modules)
    weights = scale * sum(map(math.prod, inner.values()))
    weights += sum(math.prod(shape) for name, shape in shapes.items() if name not in inner)
    adapter = 4 * scale * settings.lora_r * sum(sum(shapes[name]) for name in adapted)
    layer = _AROUND * sum(sum(shape) for shape in inner.values() if len(shape) == 2) / there
    hidden = max(shape[0] for shape in inner.values() if len(shape) == 1)
    kept = layer + count * hidden if settings.gradient_checkpointing else count * layer
    kept += _HEADS * max(shape[0] for shape in shapes.values())
    tokens = settings.per_device_train_batch_size * longest
    return TrainingMemory(int(_FLOAT * weights), int(_FLOAT * adapter), int(_FLOAT * tokens * kept))


def require_memory(
    checkpoint: Path, settings: TrainSettings, longest: int, *, available: int | None = None
) -> TrainingMemory:
    """Refuse to start where the memory cannot suffice.

    Args:
        checkpoint: that is trained; only headers are read.
        settings: the choices.
        longest: tokens of the longest row, or of the longest sequence of packed ones.
        available: bytes; None asks the machine.

    Raises:
        EnvironmentProblem: there is too little; says how much, for what, and what helps.
    """
    needed = training_memory(checkpoint, settings, longest)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes on this machine
    available = available_memory() if available is None else available
    if available is None or here * needed.total <= available:
        return needed
    several = f" in each of {here} processes" if here > 1 else ""
    ways = [
        f"{text} takes {_gb(training_memory(checkpoint, changed, longest).total)}"
        for text, changed in _less(settings)
    ]
    raise EnvironmentProblem(
        f"training needs about {_gb(needed.total)} of memory{several}, and {_gb(available)} are "
        f"available: {_gb(needed.weights)} for the weights in float32, {_gb(needed.adapter)} for "
        f"the adapter and its optimizer, {_gb(needed.activations)} for what a batch of "
        f"{settings.per_device_train_batch_size} x {longest:,} tokens leaves, and "
        f"{_gb(_LIBRARIES)} for the program.\n"
        + "; ".join([*ways, "a smaller train.max_length leaves out longer rows"])
        + "; or take a machine with more memory, or one with a GPU."
    )


def _less(settings: TrainSettings) -> list[tuple[str, TrainSettings]]:
    """Settings that take less memory and come to the same, each with its name."""
    found = []
    batch = settings.per_device_train_batch_size
    if batch > 1:
        steps = batch * settings.gradient_accumulation_steps
        small = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": steps}
        settings = settings.model_copy(update=small)
        found.append((f"train.per_device_train_batch_size 1 with {steps} accumulated", settings))
    if not settings.gradient_checkpointing:
        settings = settings.model_copy(update={"gradient_checkpointing": True})
        also = "and " if found else ""
        found.append((f"{also}train.gradient_checkpointing", settings))
    return found


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
