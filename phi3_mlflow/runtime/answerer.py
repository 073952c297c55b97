"""Runs requests on an engine, from the prompt's tokens to the answer's text."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from .answer import Choice
from .logprobs import LogprobCollector
from .engine import Engine, Guided, Session, EngineSettings, cuts
from .live import Abandoned, abandoned_by, watched
from .prefix_cache import PrefixCache
from .request import GenerationRequest, RequestError
from .sampling import Sampler
from .text import StopFinder

MEGABYTE = 1024 * 1024
_NONE = np.empty(0, dtype=np.float32)


@dataclass(frozen=True)
class ModelConfig:
    """Every `model_config` value, with what applies when it is not given.

    All of them are written into the logged model, because MLflow lets a value be overridden at
    load time only if it is there.

    Attributes:
        model_name: the `model` of every answer.
        threads, max_context, provider, rope_switch, dtype, batch: see `engine.EngineSettings`.
        max_tokens: new tokens at most, for requests that say nothing.
        temperature, top_p: for requests that say nothing; temperature 0 is greedy.
        prefix_cache_mb: megabytes of key-value cache kept for the next turn; 0 keeps nothing.
        prefill_chunk: tokens of a prompt that are computed before another request gets its turn.
    """

    model_name: str = "phi-3"
    threads: int = 0
    max_context: int = 0
    provider: str = "cpu"
    rope_switch: int = 0
    dtype: str = ""
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    prefix_cache_mb: int = 2048
    prefill_chunk: int = 64
    batch: int = 1

    @classmethod
    def read(cls, values: Mapping[str, Any] | None) -> ModelConfig:
        """Check `model_config`.

        Raises:
            ValueError: naming every value that is unknown or of the wrong kind.
        """
        values = dict(values or {})
        known = cls.__dataclass_fields__
        problems = [f"{name}: no such value" for name in values if name not in known]
        for name in known:
            if name not in values:
                continue
            default, value = getattr(cls, name), values[name]
            kind = (int, float) if isinstance(default, float) else type(default)
            if isinstance(value, bool) or not isinstance(value, kind):
                problems.append(f"{name}: expected {type(default).__name__}, found {value!r}")
            elif isinstance(value, int | float) and value < (1 if name in _POSITIVE else 0):
                problems.append(f"{name}: {value} is too small")
        if problems:
            raise ValueError("model_config: " + "; ".join(problems))
        return cls(**values)


_POSITIVE = ("max_tokens", "prefill_chunk", "batch")


class Answerer:
    """Runs requests on one engine; safe to use from several threads at once."""

    def __init__(self, engine: Engine, config: ModelConfig) -> None:
        self.engine = engine
        self.config = config
        self._lock = engine.lock
        self.prefixes = PrefixCache(engine, config.prefix_cache_mb * MEGABYTE, self._cuts)

    def prepare(self, wanted: GenerationRequest) -> tuple[list[int], int]:
        """Tokens of the prompt, and how many new ones the answer may have.

        Raises:
            RequestError: the prompt, or what is asked for on top of it, is beyond the context.
        """
        engine, field = self.engine, "prompt" if wanted.messages is None else "messages"
        with self._lock:
            if wanted.messages is None:
                tokens = engine.encode(wanted.prompt or "")
            else:
                tokens = engine.render(wanted.messages)
        room = engine.context - len(tokens)
        if room < 1:
            raise RequestError(
                [
                    f"{field}: {len(tokens)} tokens leave no room for an answer in a context of "
                    f"{engine.context}"
                ]
            )
        if wanted.max_tokens is None:
            return tokens, min(self.config.max_tokens, room)
        if wanted.max_tokens > room:
            raise RequestError(
                [
                    f"max_tokens: {wanted.max_tokens} new tokens and {len(tokens)} of the prompt "
                    f"are beyond the context of {engine.context}; at most {room} are left"
                ]
            )
        return tokens, wanted.max_tokens

    def answer(self, wanted: GenerationRequest, tokens: list[int], limit: int) -> list[Choice]:
        """All choices of a request, whole."""
        choices = []
        for index in range(wanted.n):
            pieces: list[str] = []
            running = self.pieces(wanted, tokens, limit, index)
            while True:
                try:
                    pieces.append(next(running))
                except StopIteration as end:
                    choice: Choice = end.value
                    break
            choice.text = "".join(pieces)
            choices.append(choice)
        return choices

    def answers(self, jobs: Sequence[tuple[GenerationRequest, list[int], int]]) -> list[list[Choice]]:
        """What `answer` gives for each of several requests, together where the engine can."""
        together = min(self.engine.together, len(jobs))
        if together < 2:
            return [self.answer(*job) for job in jobs]
        left = watched()

        def one(job: tuple[GenerationRequest, list[int], int]) -> list[Choice]:
            with abandoned_by(left):
                return self.answer(*job)

        with ThreadPoolExecutor(together) as threads:
            return list(threads.map(one, jobs))

    def pieces(
        self,
        wanted: GenerationRequest,
        tokens: list[int],
        limit: int,
        index: int,
        choice: Choice | None = None,
    ) -> Generator[str, None, Choice]:
        """The text of choice `index`, piece by piece; the generator returns the `Choice`.

        Args:
            choice: is filled in on the way; its text is not.

        Raises:
            Abandoned: see `live.abandoned_by`.
        """
        choice = choice or Choice("", 0, "length")
        session, done = self._session(wanted, tokens, limit)
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
            yield from self._words(wanted, session, limit, index, choice, turn)
        except (GeneratorExit, Abandoned):  # the client left; what was computed stays good
            self.prefixes.give_back(session, tokens[:done])
            raise
        except BaseException:
            session.rest(0)
            raise
        self.prefixes.give_back(session, tokens)
        return choice

    def _words(
        self,
        wanted: GenerationRequest,
        session: Session,
        limit: int,
        index: int,
        choice: Choice,
        turn: AbstractContextManager[None],
    ) -> Iterator[str]:
        """What follows the prompt that `session` holds."""
        left = watched()
        sampler, stops = Sampler(wanted.sampling, index), StopFinder(wanted.stop)
        decode = self.engine.decoder()
        top = wanted.top_logprobs
        logprobs = None if top is None else LogprobCollector(top, self.engine.spell)
        token: int | None = None
        while choice.tokens < limit:
            if left.is_set():
                raise Abandoned
            with turn:
                if wanted.schema is not None:
                    logits = session.logits() if logprobs else _NONE
                    token = cast(Guided, session).choose(sampler)
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

    def _session(self, wanted: GenerationRequest, tokens: list[int], limit: int) -> tuple[Session, int]:
        if wanted.schema is None:
            return self.prefixes.take(tokens, limit)
        with self._lock:
            return self.engine.open_guided(len(tokens) + limit, wanted.schema), 0

    def _cuts(self, tokens: Sequence[int]) -> list[int]:
        engine = self.engine
        return cuts(tokens, engine.ends, self.config.prefill_chunk, engine.rope_switch)


def onnx_engine(folder: Path, settings: EngineSettings) -> Engine:
    """The engine for a directory of the model builder: for batches if they are wanted."""
    if settings.batch > 1:
        from .engine_batch import BatchEngine
        from .batch_graph import NotBatchable

        try:
            return BatchEngine(folder, settings)
        except NotBatchable as reason:
            logging.getLogger(__name__).warning(
                "model_config batch: requests take turns, because the model %s", reason
            )
    from .engine_genai import GenaiEngine

    return GenaiEngine(folder, settings)
