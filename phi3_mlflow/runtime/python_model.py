"""The model that MLflow loads: takes requests, has them answered, shapes the answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlflow.pyfunc.model import PythonModel, PythonModelContext

from . import request
from .answer import AnswerBuilder, Choice
from .answerer import Answerer, PreparedRequest
from .engines import load_engine
from .files import require_files
from .live import Live
from .model_config import ModelConfig
from .request import GenerationRequest, RequestError, SamplingDefaults

if TYPE_CHECKING:
    from collections.abc import Iterator


class ChatPythonModel(PythonModel):
    """Answers MLflow's chat schema; `contract` "prompt" answers a text with a text instead."""

    # MLflow reads type hints on the input as a schema that replaces the signature, and warns at
    # every load when there are none; this tells it that the signature stands.
    _skip_type_hint_validation = True

    def __init__(self, contract: str = "chat") -> None:
        self._contract = contract
        self.answerer: Answerer | None = None

    def load_context(self, context: PythonModelContext) -> None:
        """Load the engine for the artifact that the model was logged with.

        Raises:
            MlflowException: a file is missing or cut off.
        """
        require_files()
        config = ModelConfig.read(context.model_config)
        engine = load_engine(context.artifacts, config.engine)
        self.answerer = Answerer(engine, config)

    def predict(  # type: ignore[no-untyped-def]  # noqa: ANN201
        self,
        context,  # noqa: ANN001
        model_input,  # noqa: ANN001
        params: dict[str, Any] | None = None,
    ):
        """Answer every request of the input.

        Returns:
            For one request its answer, for several a list of them: a `chat.completion` object, or
            under the prompt contract a text.
        """
        answerer = self._loaded()
        # All are checked before the first is answered: a mistake in the last row costs nothing.
        prepared = [answerer.prepare(one) for one in self._requests(model_input, params)]
        answers: list[Any] = []
        for one, choices in zip(prepared, answerer.answers(prepared), strict=True):
            if self._contract == "prompt":
                answers.append(choices[0].text)
            else:
                builder = AnswerBuilder(answerer.config.model_name)
                answers.append(builder.whole(choices, len(one.tokens)))
        return answers[0] if len(answers) == 1 else answers

    def predict_stream(
        self,
        context: PythonModelContext | None,
        model_input: Any,
        params: dict[str, Any] | None = None,
    ) -> Iterator[Any]:
        """Answer one request in pieces: `chat.completion.chunk` objects, or texts."""
        answerer = self._loaded()
        request, *more = self._requests(model_input, params)
        if more:
            raise RequestError(["request: a stream answers one request at a time"])
        prepared = answerer.prepare(request)
        if self._contract == "prompt":
            return answerer.pieces(prepared, 0, Choice())
        return self._chunks(answerer, prepared)

    def _chunks(self, answerer: Answerer, prepared: PreparedRequest) -> Iterator[dict[str, Any]]:
        builder = AnswerBuilder(answerer.config.model_name)
        made = 0
        for index in range(prepared.request.n):
            if first := builder.begin(index):
                yield first
            choice = Choice()
            running = answerer.pieces(prepared, index, choice)
            try:
                for text in running:
                    yield builder.piece(index, text)
            finally:
                running.close()
            made += choice.tokens
            yield builder.end(index, choice.finish_reason)
        yield builder.usage(len(prepared.tokens), made)

    def _requests(self, model_input: Any, params: dict[str, Any] | None) -> list[GenerationRequest]:
        answerer = self._loaded()
        parse = request.parse_prompt if self._contract == "prompt" else request.parse_chat
        defaults = SamplingDefaults(answerer.config.temperature, answerer.config.top_p)
        given = {key: value for key, value in (params or {}).items() if value is not None}
        found = request.input_rows(model_input)
        if not found:
            raise RequestError(["request: there is none in the input"])
        parsed: list[GenerationRequest] = []
        problems: list[str] = []
        more = 0
        for index, row in enumerate(found):
            try:
                parsed.append(parse({**row, **given}, defaults, answerer.engine.context))
            except RequestError as error:
                where = f"row {index}: " if len(found) > 1 else ""
                if len(problems) < request.MOST_PROBLEMS:
                    problems.extend(where + problem for problem in error.problems)
                else:
                    more += error.count
        if problems:
            raise RequestError(problems, more)
        return parsed

    def live(self) -> Live:
        """What a server needs beyond `predict`."""
        return Live(self._loaded())

    def _loaded(self) -> Answerer:
        if self.answerer is None:
            raise RuntimeError("the model is not loaded: load_context has not been called")
        return self.answerer
