"""How much memory a training run takes, known before the model is loaded, and which engine fits.

The weights; the adapter with its gradients and the two moments of AdamW; and what the forward pass
leaves for the backward pass: of every matrix its input and output, as much again for norms,
rotations and the activation function, and the logits. benchmarks/train_memory.py compares it with
what is measured.

The streamed engine has a layer's weights, and of the forward pass what lies between the layers, of
which much goes to a file, and what one layer leaves. benchmarks/train_streamed.py measures it.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from phi3_mlflow.core.errors import EnvironmentProblem
from phi3_mlflow.core.machine import available_memory
from phi3_mlflow.layers.room import IN_MEMORY, PASS_TOKENS
from phi3_mlflow.training.lora import Headers, adapted_tensors, reader_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from phi3_mlflow.training.settings import Engine, TrainSettings

_LIBRARIES = 1_000_000_000  # bytes
_AROUND = 1.5  # times what the matrices of a layer take in and give is kept of its forward pass
_HEADS = 3.0  # times the logits
_FLOAT = 4  # bytes
_PARTS = 5 << 26  # bytes: what some places leave in an MLP; some of the head, and of the logits
_SHARE = 0.8  # of a machine's memory that a model in memory may take
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that a process which trains takes at most, in float32 on a CPU.

    Attributes:
        weights: of the model, or of what is in memory of it at a time.
        adapter: its weights, gradients and moments.
        activations: kept for the backward pass of one batch, or of what is computed together.
    """

    weights: int
    adapter: int
    activations: int

    @property
    def total(self) -> int:
        """All of it, with the libraries."""
        return _LIBRARIES + self.weights + self.adapter + self.activations


def training_memory(
    checkpoint: Headers, settings: TrainSettings, longest: int, *, layers: int | None = None
) -> TrainingMemory:
    """Estimate what a training run takes.

    Args:
        checkpoint: that is trained; only headers are read.
        settings: the choices.
        longest: tokens of the longest row, or of the longest sequence of packed ones.
        layers: of a model with so many layers of this shape; None: as many as the checkpoint has.
    """
    sizes = _Sizes.of(checkpoint, settings)
    count = layers or sizes.layers
    weights = count * sizes.layer + sizes.others
    layer = _AROUND * sizes.around
    kept = layer + count * sizes.hidden if settings.gradient_checkpointing else count * layer
    kept += _HEADS * sizes.vocabulary
    tokens = settings.per_device_train_batch_size * longest
    tokens += settings.rehearsal_tokens if settings.rehearsal else 0
    return TrainingMemory(int(_FLOAT * weights), sizes.adapter(count), int(_FLOAT * tokens * kept))


def streamed_memory(
    checkpoint: Headers, settings: TrainSettings, longest: int, *, layers: int | None = None
) -> TrainingMemory:
    """Estimate what a training run takes that reads the model layer by layer.

    Args:
        checkpoint: that is trained; only headers are read.
        settings: the choices.
        longest: tokens of the longest row, or of the longest sequence of packed ones.
        layers: of a model with so many layers of this shape; None: as many as the checkpoint has.
    """
    sizes = _Sizes.of(checkpoint, settings)
    count = layers or sizes.layers
    batch = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    tokens = max(longest, min(PASS_TOKENS, batch * longest))
    state = _FLOAT * sizes.hidden
    # What lies between layers is in memory up to a size, of fewer tokens than the most perhaps.
    held = min(tokens, IN_MEMORY // (count * state))
    most = max(sizes.passed(tokens), held * count * state + sizes.passed(held))
    return TrainingMemory(int(_FLOAT * sizes.layer), sizes.adapter(count), most)


@dataclass(frozen=True)
class _Sizes:
    """Numbers of weights, or of values for one token.

    Attributes:
        layers: that the checkpoint has.
        layer: weights of one.
        others: weights outside of them.
        around: what the matrices of a layer take in and give.
        attention: what those of its attention do.
        hidden: states between layers.
        vocabulary: logits.
        pairs: weights of the adapter in one layer.
    """

    layers: int
    layer: float
    others: int
    around: float
    attention: float
    hidden: int
    vocabulary: int
    pairs: float

    @classmethod
    def of(cls, checkpoint: Headers, settings: TrainSettings) -> _Sizes:
        reader = reader_of(checkpoint)
        shapes = {name: reader.shape(name) for name in reader}
        inner = {name: shape for name, shape in shapes.items() if _LAYER.match(name)}
        layers = len({found[1] for name in inner if (found := _LAYER.match(name))})
        adapted = adapted_tensors(reader, settings.target_modules)
        matrices = {name: shape for name, shape in inner.items() if len(shape) == 2}
        attention = [sum(shape) for name, shape in matrices.items() if ".self_attn." in name]
        return cls(
            layers=layers,
            layer=sum(map(math.prod, inner.values())) / layers,
            others=sum(math.prod(shape) for name, shape in shapes.items() if name not in inner),
            around=sum(map(sum, matrices.values())) / layers,
            attention=sum(attention) / layers,
            hidden=max(shape[0] for shape in inner.values() if len(shape) == 1),
            vocabulary=max(shape[0] for shape in shapes.values()),
            pairs=settings.lora_r * sum(sum(shapes[name]) for name in adapted) / layers,
        )

    def passed(self, tokens: int) -> int:
        """Bytes of what a layer makes of tokens that are computed together.

        What goes in, comes between and comes back; of attention, what goes into its matrices and
        comes out of them, and then their gradients, or first an MLP for some of the places.
        """
        attention = int(_FLOAT * tokens * self.attention)
        return 3 * _FLOAT * tokens * self.hidden + attention + max(attention, _PARTS)

    def adapter(self, layers: int) -> int:
        """Bytes of an adapter for so many layers, with its gradients and both moments."""
        return int(4 * _FLOAT * layers * self.pairs)


def engine_for(
    checkpoint: Headers,
    settings: TrainSettings,
    longest: Callable[[], int],
    machine: int | None,
    on_gpu: Callable[[], bool],
) -> Engine:
    """Which engine trains: the one that is set, or the one that fits the machine.

    Where nothing fits it is the one in memory, which `require_memory` then refuses.

    Args:
        checkpoint: that is trained; only headers are read.
        settings: the choices.
        longest: counts the tokens of the longest row or sequence; asked only where the answer is
            wanted, for it takes reading the rows.
        machine: bytes that the machine has, used or not, so that the answer is always the same;
            None where that is not known.
        on_gpu: whether the model would be in a GPU's memory, of which nothing is known here; asked
            only where the answer is wanted.
    """
    if settings.engine != "auto":
        return settings.engine
    if machine is None or settings.not_streamed():
        return "memory"

    def in_memory(tokens: int) -> bool:
        return training_memory(checkpoint, settings, tokens).total <= _SHARE * machine

    if in_memory(settings.max_length) or on_gpu():
        return "memory"
    tokens = longest() if in_memory(1) else settings.max_length
    if in_memory(tokens):
        return "memory"
    fits = streamed_memory(checkpoint, settings, tokens).total <= machine
    return "streamed" if fits else "memory"


def require_memory(
    checkpoint: Path, settings: TrainSettings, longest: int, *, available: int | None = None
) -> TrainingMemory:
    """Refuse to start where the memory cannot suffice.

    Args:
        checkpoint: that is trained; only headers are read.
        settings: the choices; an engine that is auto counts as memory.
        longest: tokens of the longest row, or of the longest sequence of packed ones.
        available: bytes; None asks the machine.

    Raises:
        EnvironmentProblem: there is too little; says how much, for what, and what helps.
    """
    streamed = settings.engine == "streamed"
    estimate = streamed_memory if streamed else training_memory
    needed = estimate(checkpoint, settings, longest)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes on this machine
    available = available_memory() if available is None else available
    if available is None or here * needed.total <= available:
        return needed
    several = f" in each of {here} processes" if here > 1 else ""
    ways = [
        f"{text} takes {_gb(training_memory(checkpoint, changed, longest).total)}"
        for text, changed in ([] if streamed else less(settings))
    ]
    if not streamed and not settings.not_streamed():
        small = _gb(streamed_memory(checkpoint, settings, longest).total)
        ways.append(f"train.engine: streamed takes {small}, and longer")
    batch = f"a batch of {settings.per_device_train_batch_size} x {longest:,} tokens"
    leaves = f"rows of up to {longest:,} tokens leave" if streamed else f"{batch} leaves"
    of = "one layer's weights" if streamed else "the weights"
    machine = "a machine with more memory" + ("" if streamed else ", or one with a GPU")
    raise EnvironmentProblem(
        f"training needs about {_gb(needed.total)} of memory{several}, and {_gb(available)} are "
        f"available: {_gb(needed.weights)} for {of} in float32, {_gb(needed.adapter)} for "
        f"the adapter and its optimizer, {_gb(needed.activations)} for what {leaves}, and "
        f"{_gb(_LIBRARIES)} for the program.\n"
        + "; ".join([*ways, "a smaller train.max_length leaves out longer rows"])
        + f"; or take {machine}."
    )


def less(settings: TrainSettings) -> list[tuple[str, TrainSettings]]:
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
