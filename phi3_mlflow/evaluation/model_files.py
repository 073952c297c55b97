"""Which of a model's files a runtime opens, and how large they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phi3_mlflow.core.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

ONNX_CONFIG = "genai_config.json"


def find_model(directory: Path) -> Path:
    """The folder inside a logged model's files that a runtime opens.

    Raises:
        UserError: it holds neither an ONNX model nor a checkpoint.
    """
    for name in (ONNX_CONFIG, "config.json"):
        if found := sorted(directory.rglob(name), key=lambda file: len(file.parts)):
            return found[0].parent
    raise UserError(f"{directory.name} holds neither {ONNX_CONFIG} nor config.json; not a model")


def size_of(folder: Path) -> float:
    """Bytes of the files in a folder."""
    return float(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))
