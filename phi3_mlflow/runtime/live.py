"""What a server needs of a loaded model beyond `predict`: to stop an answer, to count its tokens.

This is the one way in which a server talks to the model under MLflow's pyfunc wrapper:
`python_model.live()` gives a `Live`; its `interface` says which version of it the model carries.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from . import request
from .answer import Choice, TokenLogprob
from .cancellation import abandoned_by

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterator, Mapping
    from contextlib import AbstractContextManager

    from .answerer import Answerer, PreparedRequest

INTERFACE = 2
"""1, in models of version 0.1, had `Part.chances` in the place of `Part.logprobs`."""


@dataclass
class Part:
    """A piece of choice `index`. The last piece of a choice has its `finish_reason`.

    Attributes:
        logprobs: `LogprobCollector.shown` for this text, when they were asked for.
        tokens: tokens made for this choice so far.
    """

    index: int
    text: str
    tokens: int
    finish_reason: str | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)


class Reply:
    """One request that is being answered.

    Attributes:
        prompt_tokens: length of the prompt in tokens.
        tokens: tokens made so far, for all choices.
    """

    def __init__(self, answerer: Answerer, prepared: PreparedRequest) -> None:
        self._answerer = answerer
        self._prepared = prepared
        self.prompt_tokens = len(prepared.tokens)
        self.tokens = 0

    def parts(self) -> Iterator[Part]:
        """Compute the answer piece by piece, the choices one after another."""
        for index in range(self._prepared.request.n):
            choice = Choice()
            running = self._answerer.pieces(self._prepared, index, choice)
            before = self.tokens
            try:
                for text in running:
                    self.tokens = before + choice.tokens
                    yield Part(index, text, choice.tokens, None, choice.take_logprobs())
            finally:
                running.close()
                self.tokens = before + choice.tokens
            yield Part(index, "", choice.tokens, choice.finish_reason, choice.take_logprobs())


class Live:
    """A loaded model, for a server. Every method may be called from several threads.

    Attributes:
        context: tokens that prompt and answer may have together.
        together: requests that are worth asking at the same time.
    """

    interface = INTERFACE

    def __init__(self, answerer: Answerer) -> None:
        self._answerer = answerer
        self.context: int = answerer.engine.context
        self.together: int = answerer.engine.together

    def parse(self, row: Mapping[str, Any], contract: str = "chat") -> request.GenerationRequest:
        """Check a request, `chat` (messages) or `prompt`; takes no time to speak of.

        Raises:
            RequestError: naming every field that is wrong, also as a list in `problems`.
        """
        config = self._answerer.config
        read = request.parse_prompt if contract == "prompt" else request.parse_chat
        given = {key: value for key, value in row.items() if value is not None}
        defaults = request.SamplingDefaults(config.temperature, config.top_p)
        return read(given, defaults, self.context)

    def begin(self, wanted: request.GenerationRequest) -> Reply:
        """Take up a request: renders and tokenizes the prompt, which waits for its turn.

        Raises:
            RequestError: it does not fit the context.
        """
        return Reply(self._answerer, self._answerer.prepare(wanted))

    def vetted(self, wanted: request.GenerationRequest) -> bool:
        """Whether `vet` takes no time."""
        return wanted.schema is None or self._answerer.engine.knows(wanted.schema)

    def vet(self, wanted: request.GenerationRequest) -> None:
        """Try the JSON schema of a request, if it has one; a new one takes a moment.

        Raises:
            RequestError: answers cannot be held to it.
        """
        if wanted.schema is not None:
            self._answerer.engine.try_schema(wanted.schema)

    def kept_bytes(self) -> int:
        """Bytes of key-value cache kept for next turns."""
        return self._answerer.prefixes.kept_bytes()

    @staticmethod
    def abandoned_by(event: threading.Event) -> AbstractContextManager[None]:
        """See the function of that name; `predict` in this thread minds it too."""
        return abandoned_by(event)
