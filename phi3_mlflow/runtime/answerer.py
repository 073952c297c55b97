"""Runs requests on an engine, from the prompt's tokens to the answer's text."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from .answer import Choice
from .cancellation import Abandoned, abandoned_by, watched
from .engine import Engine, Guided, Session, cuts
from .logprobs import LogprobCollector
from .prefix_cache import PrefixCache
from .request import GenerationRequest, RequestError
from .sampling import Sampler
from .text import StopFinder

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

    from .model_config import ModelConfig

MEGABYTE = 1024 * 1024
_NONE = np.empty(0, dtype=np.float32)


@dataclass(frozen=True)
class PreparedRequest:
    """A request with its prompt as tokens.

    Attributes:
        request: what was asked for.
        tokens: of the prompt.
        limit: new tokens that each choice may have.
    """

    request: GenerationRequest
    tokens: list[int]
    limit: int


class Answerer:
    """Runs requests on one engine; safe to use from several threads at once."""

    def __init__(self, engine: Engine, config: ModelConfig) -> None:
        self.engine = engine
        self.config = config
        self._lock = engine.lock
        self.prefixes = PrefixCache(engine, config.prefix_cache_mb * MEGABYTE, self._cuts)

    def prepare(self, request: GenerationRequest) -> PreparedRequest:
        """Render and tokenize the prompt, and see how many new tokens the answer may have.

        Raises:
            RequestError: the prompt, or what is asked for on top of it, is beyond the context.
        """
        engine, field = self.engine, "prompt" if request.messages is None else "messages"
        if request.messages is None:
            tokens = engine.encode(request.prompt or "")
        else:
            tokens = engine.render(request.messages)
        room = engine.context - len(tokens)
        if room < 1:
            raise RequestError(
                [
                    f"{field}: {len(tokens)} tokens leave no room for an answer in a context of "
                    f"{engine.context}"
                ]
            )
        if request.max_tokens is None:
            return PreparedRequest(request, tokens, min(self.config.max_tokens, room))
        if request.max_tokens > room:
            raise RequestError(
                [
                    f"max_tokens: {request.max_tokens} new tokens and {len(tokens)} of the prompt "
                    f"are beyond the context of {engine.context}; at most {room} are left"
                ]
            )
        return PreparedRequest(request, tokens, request.max_tokens)

    def answer(self, prepared: PreparedRequest) -> list[Choice]:
        """Compute all choices of a request, whole."""
        choices = []
        for index in range(prepared.request.n):
            choice = Choice()
            choice.text = "".join(self.pieces(prepared, index, choice))
            choices.append(choice)
        return choices

    def answers(self, prepared: Sequence[PreparedRequest]) -> list[list[Choice]]:
        """Compute what `answer` gives for each of several requests, in a batch if there is one."""
        together = min(self.engine.together, len(prepared))
        if together < 2:
            return [self.answer(one) for one in prepared]
        left = watched()

        def answer(one: PreparedRequest) -> list[Choice]:
            with abandoned_by(left):
                return self.answer(one)

        with ThreadPoolExecutor(together) as threads:
            return list(threads.map(answer, prepared))

    def pieces(
        self, prepared: PreparedRequest, index: int, choice: Choice
    ) -> Generator[str, None, None]:
        """Compute the text of choice `index`, piece by piece.

        Args:
            prepared: the request.
            index: each of the `n` choices draws random numbers of its own.
            choice: all but its text is filled in on the way.

        Raises:
            Abandoned: see `cancellation.abandoned_by`.
        """
        tokens = prepared.tokens
        session, done = self._session(prepared)
        turn = nullcontext() if session.shared else self._lock
        try:
            left = watched()
            for end in self._cuts(tokens):
                if end > done:
                    if left.is_set():
                        raise Abandoned
                    with turn:
                        session.extend(tokens[done:end])
                    done = end
            yield from self._generate(prepared, session, index, choice, turn)
        except (GeneratorExit, Abandoned):  # the client left; what was computed stays good
            self.prefixes.give_back(session, tokens[:done])
            raise
        except BaseException:
            session.rest(0)
            raise
        self.prefixes.give_back(session, tokens)

    def _generate(
        self,
        prepared: PreparedRequest,
        session: Session,
        index: int,
        choice: Choice,
        turn: AbstractContextManager[None],
    ) -> Iterator[str]:
        """What follows the prompt that `session` holds."""
        request, left = prepared.request, watched()
        sampler, stops = Sampler(request.sampling, index), StopFinder(request.stop)
        decode = self.engine.decoder()
        top = request.top_logprobs
        logprobs = None if top is None else LogprobCollector(top, self.engine.spell)
        token: int | None = None
        while choice.tokens < prepared.limit:
            if left.is_set():
                raise Abandoned
            with turn:
                if request.schema is not None:
                    logits = session.logits() if logprobs else _NONE
                    token = cast("Guided", session).choose(sampler)
                elif sampler.greedy and logprobs is None:
                    token = session.follow(token)
                else:
                    if token is not None:
                        session.extend([token])
                    logits = session.logits()
                    token = sampler.choose(logits)
                choice.tokens += 1
                ended = token in self.engine.ends
                piece = "" if ended else decode(token)
                text = stops.feed(piece)
            if logprobs and not ended:
                logprobs.note(token, logits, len(piece))
                choice.logprobs += logprobs.shown(len(text))
            if ended or stops.found:
                choice.finish_reason = "stop"
            if text:
                yield text
            if choice.finish_reason == "stop":
                break
        if rest := stops.rest():
            choice.logprobs += logprobs.shown(len(rest)) if logprobs else []
            yield rest

    def _session(self, prepared: PreparedRequest) -> tuple[Session, int]:
        """A session for the request, and how many tokens of the prompt it already holds."""
        tokens, limit, schema = prepared.tokens, prepared.limit, prepared.request.schema
        if schema is None:
            return self.prefixes.take(tokens, limit)
        self.engine.try_schema(schema)
        with self._lock:
            return self.engine.open_guided(len(tokens) + limit, schema), 0

    def _cuts(self, tokens: Sequence[int]) -> list[int]:
        engine = self.engine
        return cuts(tokens, engine.ends, self.config.prefill_chunk, engine.rope_switch)
