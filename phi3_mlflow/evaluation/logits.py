"""The next-token logits of a model, whichever runtime it is for."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from phi3_mlflow.core.errors import UserError
from phi3_mlflow.core.machine import usable_cores

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

ONNX_CONFIG = "genai_config.json"


class LogitSource(Protocol):
    """Something that says what it thinks comes next, at every place of a text."""

    def logits(self, tokens: Array) -> Array:
        """What comes next, at every place.

        Args:
            tokens: (B, S) int32 ids, one text per row, padded on the right at will.

        Returns:
            (B, S, vocabulary) float32.
        """


class OnnxLogits:
    """Logits of a model in onnxruntime-genai's format, computed in one prefill."""

    def __init__(self, directory: Path) -> None:
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        import onnxruntime_genai as og

        config = og.Config(str(directory))
        options = {"intra_op_num_threads": usable_cores()}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._og = og
        self._model = og.Model(config)

    def logits(self, tokens: Array) -> Array:
        """(B, S) ids to (B, S, vocabulary) logits."""
        import numpy as np

        params = self._og.GeneratorParams(self._model)
        # The whole KV buffer is allocated up front, so no longer than needed.
        rows = np.ascontiguousarray(tokens, dtype=np.int32)
        params.set_search_options(max_length=rows.shape[1] + 1, batch_size=rows.shape[0])
        generator = self._og.Generator(self._model, params)
        generator.append_tokens(rows)
        result: Array = np.asarray(generator.get_output("logits"))
        return result


class TorchLogits:
    """Logits of a Hugging Face checkpoint, in the precision it is stored in."""

    def __init__(self, directory: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, utils

        library: Any = utils.logging
        library.disable_progress_bar()
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(directory), dtype="auto", trust_remote_code=False, use_safetensors=True
        )
        model.eval()
        self._model = model
        self._torch = torch

    def logits(self, tokens: Array) -> Array:
        """(B, S) ids to (B, S, vocabulary) logits."""
        with self._torch.inference_mode():
            ids = self._torch.as_tensor(tokens, dtype=self._torch.long)
            result: Array = self._model(ids, use_cache=False).logits.float().numpy()
        return result


def find_model(directory: Path) -> Path:
    """The folder inside a logged model's files that a runtime opens.

    Raises:
        UserError: it holds neither an ONNX model nor a checkpoint.
    """
    for name in (ONNX_CONFIG, "config.json"):
        if found := sorted(directory.rglob(name), key=lambda file: len(file.parts)):
            return found[0].parent
    raise UserError(f"{directory.name} holds neither {ONNX_CONFIG} nor config.json; not a model")


def open_logits(directory: Path) -> LogitSource:
    """A model's logits, whichever runtime its files are for."""
    model = find_model(directory)
    if (model / ONNX_CONFIG).is_file():
        return OnnxLogits(model)
    return TorchLogits(model)


def local_files(model_uri: str) -> Path:
    """A logged model's files; nothing is copied where the store is on this machine."""
    import mlflow

    return Path(mlflow.artifacts.download_artifacts(artifact_uri=model_uri))
