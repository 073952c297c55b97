"""Choosing the engine for what a model was logged with."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from .batch_graph import NotBatchable
from .engine_batch import BatchEngine
from .engine_genai import GenaiEngine
from .engine_torch import TorchEngine

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .engine import Engine, EngineSettings


def load_engine(artifacts: Mapping[str, str], settings: EngineSettings) -> Engine:
    """Load the engine for the artifacts of a logged model.

    Args:
        artifacts: `onnx` with a directory of the model builder, or `checkpoint` and `tokenizer`,
            and `adapter` where a LoRA adapter is to be added to the checkpoint.
        settings: how to set the engine up.

    Raises:
        ValueError: a setting that this installation or this model cannot meet.
        ImportError: the engine's library is not installed.
    """
    if "onnx" in artifacts:
        return onnx_engine(Path(artifacts["onnx"]), settings)
    adapter = Path(artifacts["adapter"]) if "adapter" in artifacts else None
    return TorchEngine(
        Path(artifacts["checkpoint"]), Path(artifacts["tokenizer"]), settings, adapter
    )


def onnx_engine(folder: Path, settings: EngineSettings) -> Engine:
    """Load the engine for a directory of the model builder: for batches if they are wanted."""
    if settings.batch > 1:
        try:
            return BatchEngine(folder, settings)
        except NotBatchable as reason:
            logging.getLogger(__name__).warning(
                "model_config batch: requests take turns, because the model %s", reason
            )
    return GenaiEngine(folder, settings)
