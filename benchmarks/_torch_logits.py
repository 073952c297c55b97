"""A checkpoint in transformers, loaded as a whole: what the project's own way is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


class TorchLogits:
    """Logits of a Hugging Face checkpoint.

    Args:
        directory: the checkpoint.
        dtype: what it is computed in; `auto` as it is stored.
    """

    def __init__(self, directory: Path, dtype: str = "float32") -> None:
        import torch
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(
            str(directory), dtype=dtype, trust_remote_code=False, use_safetensors=True
        )
        self._model, self._torch = model.eval(), torch

    def logits(self, pieces: Sequence[Any]) -> list[Any]:
        """Token ids (S,) of each text to logits (S, vocabulary)."""
        ids = self._torch.zeros((len(pieces), max(map(len, pieces))), dtype=self._torch.long)
        for row, piece in zip(ids, pieces, strict=True):
            row[: len(piece)] = self._torch.as_tensor(piece)
        with self._torch.inference_mode():
            found = self._model(ids, use_cache=False).logits.float().numpy()
        return [row[: len(piece)] for row, piece in zip(found, pieces, strict=True)]
