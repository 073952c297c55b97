"""LoRA on the weights of a model: W + lora_alpha / lora_r * B A, in float32, rounded once."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import torch

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

_PREFIX = "base_model.model."
_ROWS = 4096
"""Rows of a matrix that are added at once, to keep float32 copies small."""


def key_of(name: str, matrix: str) -> str:
    """What PEFT calls one of the two matrices, `A` or `B`, of a weight."""
    return f"{_PREFIX}{name.removesuffix('.weight')}.lora_{matrix}.weight"


def add_product(tensor: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> float:
    """Add scale * B A to a matrix in place, some rows at a time; gives the largest change.

    Args:
        tensor: (rows, columns), any float dtype.
        a: (rank, columns), float32.
        b: (rows, rank), float32.
        scale: what the product counts.
    """
    largest = 0.0
    for start in range(0, tensor.shape[0], _ROWS):
        part = slice(start, start + _ROWS)
        change = (b[part] @ a) * scale
        tensor[part] = (tensor[part].float() + change).to(tensor.dtype)
        largest = max(largest, float(change.abs().max()))
    return largest


def add_adapter(model: Any, folder: Path) -> None:
    """Add a plain LoRA adapter, in PEFT's format, to a model in memory.

    The weights become those of the merged checkpoint; PEFT itself is not needed.

    Raises:
        ValueError: it is for weights that the model does not have.
    """
    import torch
    from safetensors import safe_open

    config = json.loads((folder / CONFIG).read_text("utf-8"))
    scale = config["lora_alpha"] / config["r"]
    weights = dict(model.named_parameters())
    pairs: Any
    with safe_open(folder / WEIGHTS, framework="pt") as pairs, torch.no_grad():
        names = set(pairs.keys())
        adapted = [name for name in weights if key_of(name, "A") in names]
        if 2 * len(adapted) != len(names):
            raise ValueError(f"the adapter {folder} is not one of this model")
        for name in adapted:
            a, b = (pairs.get_tensor(key_of(name, matrix)).float() for matrix in "AB")
            add_product(weights[name], a, b, scale)
