"""What a directory of onnxruntime-genai's model builder says of its model; its tokenizer."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from .fair_lock import FairLock
from .genai_config import GenaiConfig
from .grammar_trial import GrammarTrial
from .request import RequestError
from .tokens import ChatTokenizer, Tokenizing

if TYPE_CHECKING:
    from pathlib import Path

    from .engine import EngineSettings

# onnxruntime reports usage to Microsoft unless told otherwise, and reads this when it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


class GenaiFolder(Tokenizing):
    """The part of an engine that is about texts and limits.

    Args:
        folder: holds genai_config.json, the graph with its weights, and the tokenizer.

    Raises:
        ValueError: a setting that this model cannot meet.
    """

    def __init__(self, folder: Path, settings: EngineSettings) -> None:
        self._folder = folder
        self._settings = settings
        config = GenaiConfig.read(folder)
        if settings.max_context > config.context:
            raise ValueError(
                f"model_config max_context: {settings.max_context} is beyond the {config.context} "
                "tokens that the model was made for"
            )
        self.lock = FairLock()
        self.context = settings.max_context or config.context
        self.rope_switch = settings.rope_switch
        self.ends = config.ends
        self.decoder_graph = decoder = config.decoder
        self.window = decoder.window
        if decoder.window and not decoder.layers_have_window:
            # The builder names the window but put it into no layer of the graph, and the cache is
            # allocated for the window all the same. Within the window the model is right.
            self.context = min(self.context, self.window)
        self.token_bytes = decoder.token_values * np.dtype(settings.kv_cache).itemsize
        self._tokenizer = ChatTokenizer(folder, config.ends)
        self._grammars = GrammarTrial(folder)

    def knows(self, schema: str) -> bool:
        """Whether `try_schema` answers at once."""
        return self._grammars.knows(schema)

    def try_schema(self, schema: str) -> None:
        """Make the grammar of a JSON schema where that harms nobody, unless it is known.

        Raises:
            RequestError: it cannot be made, or takes too much.
        """
        if why := self._grammars.refusal(schema):
            raise RequestError([f"response_format: the JSON schema cannot be followed: {why}"])


def threads(settings: EngineSettings) -> int:
    """Processor threads to take: left alone, onnxruntime-genai takes half of them."""
    return settings.threads or len(os.sched_getaffinity(0))


def session_config(og: Any, folder: Path, provider: str, threads: int) -> Any:
    """What onnxruntime-genai opens a folder's model with.

    Args:
        og: the module onnxruntime_genai.
        folder: holds genai_config.json.
        provider: `cpu` or `cuda`, whatever the model was built for.
        threads: processor threads.

    Raises:
        ValueError: a provider that this installation does not have.
    """
    config = og.Config(str(folder))
    config.clear_providers()
    if provider == "cuda":
        if not og.is_cuda_available():
            raise ValueError(
                "model_config provider: the installed onnxruntime-genai has no CUDA; install "
                "onnxruntime-genai-cuda in its place, or take provider 'cpu'"
            )
        config.append_provider("cuda")
    elif provider != "cpu":
        raise ValueError(f"model_config provider: {provider!r} is neither 'cpu' nor 'cuda'")
    options = {"intra_op_num_threads": threads}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    return config


def provider_here(og: Any, folder: Path) -> str:
    """Where a folder's model is computed here: `cuda` if it was built for that and there is one."""
    built_for_cuda = GenaiConfig.read(folder).decoder.provider == "cuda"
    return "cuda" if built_for_cuda and og.is_cuda_available() else "cpu"
