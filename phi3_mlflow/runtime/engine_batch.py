"""The engine that computes the requests of several threads together.

Reading the weights is what a token costs; computing them for eight sequences at once reads them
once. A sequence joins and leaves between any two tokens (see `scheduler`).
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from .batch_graph import BatchGraph, NotBatchable
from .engine_genai import GenaiEngine
from .genai_folder import GenaiFolder, threads
from .scheduler import BatchScheduler, BatchSession

if TYPE_CHECKING:
    from pathlib import Path

    from .engine import EngineSettings, Guided, Session


class BatchEngine(GenaiFolder):
    """A directory made by onnxruntime-genai's model builder, computed by onnxruntime itself.

    Two kinds of request are handed to onnxruntime-genai, which loads the weights once more when
    the first one comes: those whose answer follows a JSON schema, and those that go beyond the
    switch of a LongRoPE model, which is one for all sequences of a batch.

    Args:
        folder: holds genai_config.json, the graph with its weights, and the tokenizer.

    Raises:
        NotBatchable: this model or this setting needs another engine.
        ValueError: a setting that this model cannot meet.
    """

    def __init__(self, folder: Path, settings: EngineSettings) -> None:
        super().__init__(folder, settings)
        if settings.provider != "cpu":
            raise NotBatchable(f"runs on {settings.provider}")
        self.together = settings.batch
        graph = BatchGraph(
            folder, self.decoder_graph, threads(settings), settings.batch, self.context
        )
        self._scheduler = BatchScheduler(graph, self.lock)
        self._alone: GenaiEngine | None = None
        self._guard = threading.Lock()

    def open(self, capacity: int) -> Session:
        """Open an empty session; beyond the LongRoPE switch it is one of onnxruntime-genai."""
        if 0 < self.rope_switch < capacity:
            return self._other().open(capacity)
        return BatchSession(self._scheduler, self.rope_switch or self.context)

    def open_guided(self, capacity: int, schema: str) -> Guided:
        """Open an empty session of onnxruntime-genai whose answer follows a JSON schema."""
        return self._other().open_guided(capacity, schema)

    def _other(self) -> GenaiEngine:
        with self._guard:
            if self._alone is None:
                self._alone = GenaiEngine(self._folder, self._settings)
            return self._alone
