"""The matrices of a LoRA adapter by themselves, without a model around them.

W x + lora_alpha / lora_r * B A x. Names, first values and files are peft's.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch.nn.functional import linear

from phi3_mlflow.layers.layer import DOWN, GATE_UP, OUTPUT, QKV
from phi3_mlflow.runtime.adapter import CONFIG, WEIGHTS, key_of
from phi3_mlflow.training.lora import adapted_tensors, lora_config

if TYPE_CHECKING:
    from pathlib import Path

    from phi3_mlflow.checkpoints.reader import CheckpointReader
    from phi3_mlflow.training.settings import TrainSettings

_ORDER = (OUTPUT, QKV, GATE_UP, DOWN)
"""Of a layer's projections, in transformers; peft draws first values in this order."""


class Adapter:
    """Two float32 matrices for each projection: A (rank, in) and B (out, rank).

    Args:
        reader: of the checkpoint; only headers are read.
        settings: rank, scale, which projections, and the seed of the first values.
    """

    def __init__(self, reader: CheckpointReader, settings: TrainSettings) -> None:
        self._config = lora_config(settings)
        self._scale = settings.lora_alpha / settings.lora_r
        self.pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            for name in sorted(adapted_tensors(reader, settings.target_modules), key=_place):
                self.pairs[name] = _first_values(reader.shape(name), settings.lora_r)

    @property
    def parameters(self) -> list[torch.Tensor]:
        """All matrices, in the order of the model's layers."""
        return [matrix for pair in self.pairs.values() for matrix in pair]

    def __call__(self, name: str, given: torch.Tensor, product: torch.Tensor) -> torch.Tensor:
        """Add what the adapter makes of an input to the product of a matrix; see `Adapt`."""
        if name not in self.pairs:
            return product
        a, b = self.pairs[name]
        return product.addmm_(linear(given, a), b.T, alpha=self._scale)

    def save(self, folder: Path) -> None:
        """Write both files of PEFT's format."""
        tensors = {
            key_of(name, matrix): tensor.detach()
            for name, pair in self.pairs.items()
            for matrix, tensor in zip("AB", pair, strict=True)
        }
        # Written by Python, which tells a full disk from other faults.
        content = safetensors.torch.save(tensors, metadata={"format": "pt"})
        (folder / WEIGHTS).write_bytes(content)
        fields: Any = self._config.to_dict  # untyped in peft
        config = {**fields(), "inference_mode": True}
        config["target_modules"] = sorted(config["target_modules"])
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), "utf-8")

    def load(self, folder: Path) -> None:
        """Take over what `save` has written."""
        tensors = safetensors.torch.load_file(folder / WEIGHTS)
        with torch.no_grad():
            for name, pair in self.pairs.items():
                for matrix, tensor in zip("AB", pair, strict=True):
                    tensor.copy_(tensors[key_of(name, matrix)])


def _place(name: str) -> tuple[int, int]:
    """Where a projection comes in the model: its layer, and which one it is in that."""
    _, _, number, module = name.removesuffix(".weight").split(".", 3)
    return int(number), _ORDER.index(module)


def _first_values(shape: tuple[int, ...], rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A random and B zero, drawn as peft does: it makes both, and then draws A again."""
    a, b = torch.empty(rank, shape[1]), torch.empty(shape[0], rank)
    for matrix in (a, b, a):
        torch.nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
    return a.requires_grad_(), b.zero_().requires_grad_()
