"""The engine over onnxruntime-genai."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from .genai_folder import GenaiFolder, session_config, threads
from .request import RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from .engine import EngineSettings
    from .sampling import Sampler


class GenaiEngine(GenaiFolder):
    """A directory made by onnxruntime-genai's model builder.

    Args:
        folder: holds genai_config.json, the graph with its weights, and the tokenizer.

    Raises:
        ValueError: a setting that this installation or this model cannot meet.
    """

    together = 1

    def __init__(self, folder: Path, settings: EngineSettings) -> None:
        import onnxruntime_genai as og

        super().__init__(folder, settings)
        if settings.provider == "cuda" and self.decoder_graph.provider != "cuda":
            logging.getLogger(__name__).warning(
                "model_config provider: this model was exported for the CPU, which then computes "
                "its attention, many times slower than a GPU would; export it with "
                "runtime.provider cuda"
            )
        self._og = og
        config = session_config(og, folder, settings.provider, threads(settings))
        self._model = self._og.Model(config)

    def open_guided(self, capacity: int, schema: str) -> GuidedSession:
        """Open an empty session whose answer follows a JSON schema.

        Raises:
            RequestError: this installation cannot, or not this schema.
        """
        params = self._og.GeneratorParams(self._model)
        params.set_search_options(max_length=capacity, do_sample=False)
        if not hasattr(params, "set_guidance"):
            raise RequestError(
                [
                    "response_format: the installed onnxruntime-genai was built without guidance, "
                    "so it cannot hold an answer to a JSON schema"
                ]
            )
        if 0 < self.rope_switch < capacity:
            raise RequestError(
                [
                    "response_format: with a JSON schema, prompt and max_tokens together may be "
                    f"{self.rope_switch} tokens; they are {capacity}"
                ]
            )
        try:
            params.set_guidance("json_schema", schema)
            generator = self._og.Generator(self._model, params)
        except RuntimeError as error:  # the grammar's compiler, or a build without it, says why
            why = " ".join(str(error).split())
            raise RequestError(
                [f"response_format: the JSON schema cannot be followed: {why[:300]}"]
            ) from error
        return GuidedSession(generator, capacity, self.rope_switch, self.window)

    def open(self, capacity: int) -> GenaiSession:
        """Open an empty session that can hold `capacity` tokens."""
        params = self._og.GeneratorParams(self._model)
        # max_length counts the prompt, and the key-value cache for all of it is allocated at once.
        params.set_search_options(max_length=capacity, do_sample=False)
        return GenaiSession(
            self._og.Generator(self._model, params), capacity, self.rope_switch, self.window
        )


class GenaiSession:
    """A generator that is only ever appended to: the tokens are chosen outside of it.

    So a generator carries no sampling options and no random state, and can serve any request.
    """

    shared = False

    def __init__(self, generator: Any, capacity: int, rope_switch: int, window: int) -> None:
        self.capacity = self.room = capacity
        self.reusable = True
        self._generator = generator
        self._rope_switch = rope_switch
        self._window = window
        self._length = 0

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens and compute."""
        new = np.asarray(tokens, dtype=np.int32)
        switch = self._rope_switch
        if 0 < self._length <= switch < self._length + len(new):
            # LongRoPE: from here on every position is encoded with the long factors, so what was
            # computed with the short ones is computed again.
            old = np.asarray(self._generator.get_sequence(0), dtype=np.int32)[: self._length]
            self._generator.rewind_to(0)
            new = np.concatenate([old, new])
            self._length = 0
        self._generator.append_tokens(new)
        self._count(len(new))

    def _count(self, new: int) -> None:
        self._length += new
        # A cache of the size of the window overwrites what has left it.
        for limit in (self._rope_switch, self._window):
            self.reusable = self.reusable and not 0 < limit < self._length

    def follow(self, token: int | None) -> int:
        """Append `token`, if there is one, and choose the likeliest one after it."""
        if self._rope_switch:  # the runtime's own step knows nothing of the switch
            if token is not None:
                self.extend([token])
            return int(self.logits().argmax())
        # Chooses and appends; what follows it is computed by the next step.
        self._generator.generate_next_token()
        self._count(1)
        return int(self._generator.get_next_tokens()[0])

    def logits(self) -> NDArray[np.float32]:
        """Return the logits of the token that follows, shape (V,), float32."""
        return np.asarray(self._generator.get_logits(), dtype=np.float32).reshape(-1)

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self._generator.rewind_to(length)
        self._length = length

    def rest(self, length: int) -> None:
        """Nothing to do: the generator keeps its memory until it is let go."""


class GuidedSession(GenaiSession):
    """A session whose answer follows a grammar: the runtime keeps its state and masks the rest."""

    def __init__(self, generator: Any, capacity: int, rope_switch: int, window: int) -> None:
        super().__init__(generator, capacity, rope_switch, window)
        self.reusable = False  # the grammar cannot be rewound

    def choose(self, sampler: Sampler) -> int:
        """Choose the next token among those that the grammar allows, and append it."""
        scores = sampler.scores(self.logits())
        self._generator.set_logits(scores.reshape(1, 1, -1))
        self._generator.generate_next_token()
        token = int(self._generator.get_next_tokens()[0])
        sampler.count(token)
        self._count(1)
        self.reusable = False
        return token
