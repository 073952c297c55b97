"""The sizes of a model that may not be there yet, and what a step needs, in words."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from phi3_mlflow.checkpoints.configuration import (
    ARCHITECTURE,
    expected_shapes,
    head_size,
    key_value_heads,
)
from phi3_mlflow.checkpoints.reader import CheckpointReader

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Foreseen:
    """What a step needs.

    Attributes:
        memory: bytes, resident at its highest point.
        disk: bytes, of what it leaves and of what it needs meanwhile.
        download: bytes.
        seconds: of work; None where that depends on the network.
    """

    memory: int = 0
    disk: int = 0
    download: int = 0
    seconds: float | None = None

    def __str__(self) -> str:
        parts = [
            f"{size / 1e9:.1f} GB of {what}"
            for size, what in (
                (self.memory, "memory"), (self.disk, "disk"), (self.download, "download"),
            )
            if size >= 5e7
        ]  # fmt: skip
        if self.seconds is not None:
            parts.append(roughly(self.seconds))
        return ", ".join(parts)


def roughly(seconds: float) -> str:
    """A time as one says it that is not known exactly."""
    if seconds < 90:
        return f"some {max(1, round(seconds))} s"
    if seconds < 90 * 60:
        return f"some {round(seconds / 60)} min"
    return f"some {seconds / 3600:.1f} h"


class Model:
    """The sizes of a model in Phi-3's architecture.

    Args:
        config: its config.json, or as much of it as says its sizes.
        dtype: of its weights, by safetensors' name.
    """

    def __init__(self, config: Mapping[str, Any], dtype: str) -> None:
        # How far a model looks back is no size of it, and a plan is made for some length only.
        self.config = {"architectures": [ARCHITECTURE], "max_position_embeddings": 4096, **config}
        shapes, optional = expected_shapes(self.config)
        shapes = {name: shape for name, shape in shapes.items() if name not in optional}
        self.reader = CheckpointReader.imagined(shapes, dtype)
        self.nbytes = sum(self.reader.entry(name).nbytes for name in self.reader)
        self.weights = sum(prod(shape) for shape in shapes.values())
        layer = [name for name in shapes if name.startswith("model.layers.0.")]
        self.attention: int = sum(prod(shapes[name]) for name in layer if "_attn." in name)
        self.mlp: int = sum(prod(shapes[name]) for name in layer if ".mlp." in name)
        self.layers: int = config["num_hidden_layers"]
        self.hidden: int = config["hidden_size"]
        self.head: int = self.hidden * config["vocab_size"]

    @property
    def products(self) -> int:
        """Multiplications for one token."""
        return self.layers * (self.attention + self.mlp) + self.head

    @property
    def cached(self) -> int:
        """Bytes of keys and values for one token, in float32."""
        return 8 * self.layers * key_value_heads(self.config) * head_size(self.config)
