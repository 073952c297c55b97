"""A model in a worker process: loaded once, asked batch after batch.

Both engines run this, Spark's in the Python processes of its executors, which need not have more
than the model's own requirements.
"""

from __future__ import annotations

import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

Values = list[Any]
"""`[response, finish_reason, prompt_tokens, completion_tokens, error]`, the fields of `Result`."""

_ERROR_LIMIT = 2000  # characters


@dataclass(frozen=True)
class WorkerSettings:
    """How a model is loaded and asked; plain values, so that it travels to any process.

    Attributes:
        model: a folder with an MLmodel file.
        threads: processor threads of one worker.
        batch: rows that one worker computes together, if the model can.
        prompts: the model takes a literal prompt instead of messages.
        seeded: the model takes a seed.
        options: `max_tokens`, `temperature`, `top_p`, as far as they were given.
        seed: of the whole run; every row gets one of its own, made from it and the row's index.
    """

    model: str
    threads: int
    prompts: bool
    seeded: bool
    options: dict[str, Any]
    seed: int
    batch: int = 1


class LoadedModel:
    """The model of a worker process.

    Attributes:
        together: how many rows it computes at once.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        # MLflow's message for a request outside its schema would repeat the whole request.
        os.environ["MLFLOW_DISABLE_SCHEMA_DETAILS"] = "true"
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        import mlflow

        logging.getLogger("mlflow").setLevel(logging.ERROR)
        self._settings = settings
        config = {"threads": settings.threads, "batch": settings.batch}
        self._model = mlflow.pyfunc.load_model(settings.model, model_config=config)
        self.together = _together(self._model)

    def answer(self, index: int, request: dict[str, Any]) -> Values:
        """The result of one row; whatever goes wrong with it is its error."""
        try:
            return self._answer(index, request)
        except Exception as error:
            message = getattr(error, "message", "") or str(error) or type(error).__name__
            return [None, None, None, None, message[:_ERROR_LIMIT]]

    def _answer(self, index: int, request: dict[str, Any]) -> Values:
        settings = self._settings
        params = {"seed": row_seed(settings.seed, index)} if settings.seeded else {}
        if settings.prompts:
            text = self._model.predict(request, params={**settings.options, **params})
            return [text, None, None, None, None]
        answer = self._model.predict({**request, **settings.options}, params=params or None)
        if isinstance(answer, list):  # as MLflow's own wrapper of transformers gives it
            answer = answer[0]
        choice, usage = answer["choices"][0], answer.get("usage") or {}
        return [
            choice["message"]["content"],
            choice.get("finish_reason"),
            usage.get("prompt_tokens"),
            usage.get("completion_tokens"),
            None,
        ]


def _together(model: Any) -> int:
    """How many rows a model computes at once."""
    try:
        return int(model.unwrap_python_model().live().together)
    except Exception:  # not a model of this project, or one from before there were batches
        return 1


def row_seed(seed: int, index: int) -> int:
    """The seed of one row, below 2**63: the same wherever and whenever the row is scored."""
    import hashlib

    digest = hashlib.sha256(f"{seed}:{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


_loaded: dict[str, LoadedModel] = {}


def loaded_model(settings: WorkerSettings) -> tuple[LoadedModel, bool]:
    """The model of this process, and whether this call had to load it."""
    key = repr(settings)
    if found := _loaded.get(key):
        return found, False
    _loaded.clear()  # a worker that serves another run does not keep both models
    _loaded[key] = LoadedModel(settings)
    return _loaded[key], True


def answer_batch(
    settings: WorkerSettings, batch: Sequence[tuple[int, str]]
) -> tuple[list[Values], bool]:
    """Answer a batch.

    Args:
        settings: which model, and how it is asked.
        batch: index and request, as JSON, of each row.

    Returns:
        Each row's values, and whether the model was loaded for it.
    """
    model, fresh = loaded_model(settings)

    def answer(row: tuple[int, str]) -> Values:
        return model.answer(row[0], json.loads(row[1]))

    if model.together == 1:
        return [answer(row) for row in batch], fresh
    with ThreadPoolExecutor(model.together) as threads:
        return list(threads.map(answer, batch)), fresh
