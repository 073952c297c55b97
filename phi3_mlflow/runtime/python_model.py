"""The model that MLflow loads: takes requests, has them answered, shapes the answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlflow.pyfunc import PythonModel, PythonModelContext

from . import request
from .answer import ChunkMaker, completion
from .answerer import Answerer, ModelConfig, onnx_engine
from .engine import EngineSettings
from .live import Live
from .request import SamplingDefaults, GenerationRequest, RequestError


class ChatPythonModel(PythonModel):
    """Answers MLflow's chat schema; `contract` "prompt" answers a text with a text instead."""

    # MLflow reads type hints on the input as a schema that replaces the signature, and warns at
    # every load when there are none; this tells it that the signature stands.
    _skip_type_hint_validation = True

    def __init__(self, contract: str = "chat") -> None:
        self._contract = contract
        self.answerer: Answerer | None = None

    def load_context(self, context: PythonModelContext) -> None:
        """Load the engine for the artifact that the model was logged with."""
        config = ModelConfig.read(context.model_config)
        settings = EngineSettings(
            threads=config.threads,
            max_context=config.max_context,
            provider=config.provider,
            rope_switch=config.rope_switch,
            dtype=config.dtype,
            batch=config.batch,
        )
        if "onnx" in context.artifacts:
            engine = onnx_engine(Path(context.artifacts["onnx"]), settings)
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
        for (_, tokens, _), choices in zip(jobs, answerer.answers(jobs), strict=True):
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
        self, answerer: Answerer, wanted: GenerationRequest, tokens: list[int], limit: int
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

    def _requests(self, model_input: Any, params: dict[str, Any] | None) -> list[GenerationRequest]:
        answerer = self._loaded()
        parse = request.parse_prompt if self._contract == "prompt" else request.parse_chat
        defaults = SamplingDefaults(answerer.config.temperature, answerer.config.top_p)
        given = {key: value for key, value in (params or {}).items() if value is not None}
        found = request.rows(model_input)
        if not found:
            raise RequestError(["request: there is none in the input"])
        parsed: list[GenerationRequest] = []
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
