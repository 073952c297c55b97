"""The model that MLflow loads: takes requests, runs them on an engine, shapes the answers."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from mlflow.pyfunc import PythonModel, PythonModelContext

from . import request
from .answer import Choice, ChunkMaker, completion
from .chances import Chances
from .engine import Engine, Guided, Session, Settings, cuts
from .live import Abandoned, Live, watched
from .prefixes import Prefixes
from .request import Defaults, Request, RequestError
from .sampling import Sampler
from .text import StopFinder
from .turns import Turns

MEGABYTE = 1024 * 1024
_NONE = np.empty(0, dtype=np.float32)


@dataclass(frozen=True)
class Config:
    """Every `model_config` value, with what applies when it is not given.

    All of them are written into the logged model, because MLflow lets a value be overridden at
    load time only if it is there.

    Attributes:
        model_name: the `model` of every answer.
        threads, max_context, provider, rope_switch, dtype: see `engine.Settings`.
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

    @classmethod
    def read(cls, values: Mapping[str, Any] | None) -> Config:
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


_POSITIVE = ("max_tokens", "prefill_chunk")


class Answerer:
    """Runs requests on one engine; safe to use from several threads at once."""

    def __init__(self, engine: Engine, config: Config) -> None:
        self.engine = engine
        self.config = config
        self._turns = Turns()
        self.prefixes = Prefixes(engine, config.prefix_cache_mb * MEGABYTE, self._cuts)

    def prepare(self, wanted: Request) -> tuple[list[int], int]:
        """Tokens of the prompt, and how many new ones the answer may have.

        Raises:
            RequestError: the prompt, or what is asked for on top of it, is beyond the context.
        """
        engine, field = self.engine, "prompt" if wanted.messages is None else "messages"
        with self._turns:
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

    def answer(self, wanted: Request, tokens: list[int], limit: int) -> list[Choice]:
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

    def pieces(
        self,
        wanted: Request,
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
        choice, left = choice or Choice("", 0, "length"), watched()
        session, done = self._session(wanted, tokens, limit)
        for end in self._cuts(tokens):
            if end > done:
                if left.is_set():
                    if done:
                        self.prefixes.give_back(session, tokens[:done])
                    raise Abandoned
                with self._turns:
                    session.extend(tokens[done:end])
                done = end
        sampler, stops = Sampler(wanted.sampling, index), StopFinder(wanted.stop)
        decode = self.engine.decoder()
        top = wanted.top_logprobs
        chances = None if top is None else Chances(top, self.engine.spell)
        token: int | None = None
        try:
            while choice.tokens < limit:
                if left.is_set():
                    raise Abandoned
                with self._turns:
                    if wanted.schema is not None:
                        logits = session.logits() if chances else _NONE
                        token = cast(Guided, session).choose(sampler)
                    elif sampler.greedy and chances is None:
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
                if chances and not ended:
                    chances.note(token, logits, len(piece))
                    choice.chances += chances.shown(len(text))
                if ended or stops.found:
                    choice.finish_reason = "stop"
                if text:
                    yield text
                if choice.finish_reason == "stop":
                    break
            if rest := stops.rest():
                choice.chances += chances.shown(len(rest)) if chances else []
                yield rest
        except (GeneratorExit, Abandoned):  # the client left; what was computed stays good
            self.prefixes.give_back(session, tokens)
            raise
        self.prefixes.give_back(session, tokens)
        return choice

    def _session(self, wanted: Request, tokens: list[int], limit: int) -> tuple[Session, int]:
        if wanted.schema is None:
            return self.prefixes.take(tokens, limit)
        with self._turns:
            return self.engine.open_guided(len(tokens) + limit, wanted.schema), 0

    def _cuts(self, tokens: Sequence[int]) -> list[int]:
        engine = self.engine
        return cuts(tokens, engine.ends, self.config.prefill_chunk, engine.rope_switch)


class ChatFront(PythonModel):
    """Answers MLflow's chat schema; `contract` "prompt" answers a text with a text instead."""

    # MLflow reads type hints on the input as a schema that replaces the signature, and warns at
    # every load when there are none; this tells it that the signature stands.
    _skip_type_hint_validation = True

    def __init__(self, contract: str = "chat") -> None:
        self._contract = contract
        self.answerer: Answerer | None = None

    def load_context(self, context: PythonModelContext) -> None:
        """Load the engine for the artifact that the model was logged with."""
        config = Config.read(context.model_config)
        settings = Settings(
            threads=config.threads,
            max_context=config.max_context,
            provider=config.provider,
            rope_switch=config.rope_switch,
            dtype=config.dtype,
        )
        if "onnx" in context.artifacts:
            from .engine_genai import GenaiEngine

            engine: Engine = GenaiEngine(Path(context.artifacts["onnx"]), settings)
        else:
            from .engine_torch import TorchEngine

            engine = TorchEngine(
                Path(context.artifacts["checkpoint"]),
                Path(context.artifacts["tokenizer"]),
                settings,
            )
        self.answerer = Answerer(engine, config)

    def predict(  # type: ignore[no-untyped-def]
        self, context, model_input, params: dict[str, Any] | None = None
    ):
        """Answer every request of the input.

        Returns:
            For one request its answer, for several a list of them: a `chat.completion` object, or
            under the prompt contract a text.
        """
        answerer = self._loaded()
        # All are checked before the first is answered: a mistake in the last row costs nothing.
        jobs = []
        for wanted in self._requests(model_input, params):
            jobs.append((wanted, *answerer.prepare(wanted)))
        answers: list[Any] = []
        for wanted, tokens, limit in jobs:
            choices = answerer.answer(wanted, tokens, limit)
            if self._contract == "prompt":
                answers.append(choices[0].text)
            else:
                name = answerer.config.model_name
                answers.append(completion(name, len(tokens), choices))
        return answers[0] if len(answers) == 1 else answers

    def predict_stream(
        self,
        context: PythonModelContext | None,
        model_input: Any,
        params: dict[str, Any] | None = None,
    ) -> Iterator[Any]:
        """Answer one request in pieces: `chat.completion.chunk` objects, or texts."""
        answerer = self._loaded()
        wanted, *more = self._requests(model_input, params)
        if more:
            raise RequestError(["request: a stream answers one request at a time"])
        tokens, limit = answerer.prepare(wanted)
        if self._contract == "prompt":
            return answerer.pieces(wanted, tokens, limit, 0)
        return self._chunks(answerer, wanted, tokens, limit)

    def _chunks(
        self, answerer: Answerer, wanted: Request, tokens: list[int], limit: int
    ) -> Iterator[dict[str, Any]]:
        maker = ChunkMaker(answerer.config.model_name)
        made = 0
        for index in range(wanted.n):
            delta = {"role": "assistant", "content": ""}
            yield maker.delta(index, delta)
            running = answerer.pieces(wanted, tokens, limit, index)
            try:
                while True:
                    yield maker.delta(index, {"content": next(running)})
            except StopIteration as end:
                choice = end.value
            finally:
                running.close()
            made += choice.tokens
            yield maker.delta(index, {}, choice.finish_reason)
        yield maker.last(len(tokens), made)

    def _requests(self, model_input: Any, params: dict[str, Any] | None) -> list[Request]:
        answerer = self._loaded()
        parse = request.parse_prompt if self._contract == "prompt" else request.parse_chat
        defaults = Defaults(answerer.config.temperature, answerer.config.top_p)
        given = {key: value for key, value in (params or {}).items() if value is not None}
        found = request.rows(model_input)
        if not found:
            raise RequestError(["request: there is none in the input"])
        parsed: list[Request] = []
        problems: list[str] = []
        for index, row in enumerate(found):
            try:
                parsed.append(parse({**row, **given}, defaults, answerer.engine.context))
            except RequestError as error:
                where = f"row {index}: " if len(found) > 1 else ""
                problems.extend(where + problem for problem in error.problems)
        if problems:
            raise RequestError(problems)
        return parsed

    def live(self) -> Live:
        """What a server needs beyond `predict`."""
        return Live(self._loaded())

    def _loaded(self) -> Answerer:
        if self.answerer is None:
            raise RuntimeError("the model is not loaded: load_context has not been called")
        return self.answerer
