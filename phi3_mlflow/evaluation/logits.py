"""The next-token logits of a model in onnxruntime-genai's format."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Protocol

from phi3_mlflow.core.machine import usable_cores
from phi3_mlflow.genai.kept import token_bytes
from phi3_mlflow.runtime.genai_folder import provider_here, session_config

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    Array = NDArray[Any]

_MOST_CACHE = 1 << 29  # bytes of keys and values that are held at once


class LogitSource(Protocol):
    """Something that says what it thinks comes next, at every place of a text."""

    def logits(self, pieces: Sequence[Array]) -> Sequence[Array]:
        """What comes next, at every place.

        Args:
            pieces: int32 token ids (S,) of each text, of whatever lengths.

        Returns:
            float32 (S, vocabulary) of each text.
        """


class OnnxLogits:
    """Logits of a model in onnxruntime-genai's format, computed in one prefill."""

    def __init__(self, directory: Path) -> None:
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        import onnxruntime_genai as og

        self._og = og
        provider = provider_here(og, directory)
        self._model = og.Model(session_config(og, directory, provider, usable_cores()))
        self._places = _MOST_CACHE // token_bytes(directory)

    def logits(self, pieces: Sequence[Array]) -> list[Array]:
        """Token ids (S,) of each text to logits (S, vocabulary).

        Those of a large model are computed some texts at a time, for the keys and values of one
        place are more than its logits.
        """
        rows = max(1, self._places // max(map(len, pieces)))
        parts = [pieces[start : start + rows] for start in range(0, len(pieces), rows)]
        return [found for part in parts for found in self._prefill(part)]

    def _prefill(self, pieces: Sequence[Array]) -> list[Array]:
        import numpy as np

        rows = np.zeros((len(pieces), max(map(len, pieces))), dtype=np.int32)
        for row, piece in zip(rows, pieces, strict=True):
            # What is padded on the right comes later, so no place of a piece ever looks at it.
            row[: len(piece)] = piece
        params = self._og.GeneratorParams(self._model)
        # The whole KV buffer is allocated up front, so no longer than needed.
        params.set_search_options(max_length=rows.shape[1] + 1, batch_size=rows.shape[0])
        generator = self._og.Generator(self._model, params)
        generator.append_tokens(rows)
        found: Array = np.asarray(generator.get_output("logits"), dtype=np.float32)
        return [row[: len(piece)] for row, piece in zip(found, pieces, strict=True)]
