"""The model under MLflow's pyfunc wrapper, as the server sees it.

Models that this project logged carry `runtime/live.py` (`serving/live.py` in version 0.1), which
can stop an answer and tells its log probabilities. Any other pyfunc model with MLflow's chat schema
is asked through `predict` and `predict_stream`; what these cannot do is refused with status 400.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from phi3_mlflow.runtime import cancellation, live
from phi3_mlflow.runtime import request as contract_rules
from phi3_mlflow.runtime.text import StopFinder
from phi3_mlflow.server.errors import ApiError

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Iterator, Mapping

    from mlflow.pyfunc import PyFuncModel

    from phi3_mlflow.runtime.answer import TokenLogprob

_AS_GOOD_AS_GREEDY = 1e-4
_ANY_CONTEXT = 1 << 20  # such a model does not say how long its context is


class BackendPart(Protocol):
    """See `runtime.live.Part`."""

    index: int
    text: str
    tokens: int
    finish_reason: str | None
    logprobs: list[TokenLogprob]


class BackendReply(Protocol):
    """See `runtime.live.Reply`."""

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt, as far as the model tells it."""

    @property
    def tokens(self) -> int:
        """Tokens made so far, for all choices."""

    def parts(self) -> Iterator[BackendPart]:
        """The answer piece by piece."""


class Backend(Protocol):
    """What the server asks of a model; every method may be called from several threads."""

    together: int
    """Requests that are worth asking at the same time."""

    def parse(self, row: Mapping[str, Any], contract: str = "chat") -> Any:
        """Check a request of the contract `chat` or `prompt`; errors carry `problems`."""

    def begin(self, wanted: Any) -> BackendReply:
        """Take up a request that `parse` let through."""

    def kept_bytes(self) -> int:
        """Bytes of key-value cache kept for next turns."""

    def abandoned_by(self, event: threading.Event) -> contextlib.AbstractContextManager[None]:
        """While it lasts, what this thread asks the model for ends soon after the event is set."""


def backend_of(model: PyFuncModel) -> Backend:
    """The best way to talk to a loaded model."""
    from mlflow.exceptions import MlflowException

    try:
        wrapper: Any = model  # untyped there
        inner = wrapper.unwrap_python_model()
    except MlflowException:  # not a Python model
        inner = None
    if inner is not None and hasattr(inner, "live"):
        backend: Backend = inner.live()
        interface = getattr(backend, "interface", 0)
        if interface == live.INTERFACE:
            return backend
        if interface == 1:
            return FirstInterface(backend)
    return MlflowChat(model)


@dataclass
class _Piece:
    index: int
    text: str
    tokens: int = 0
    finish_reason: str | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)


class FirstInterface:
    """A model with the first version of `live.py`: the log probabilities of a part are `chances`.

    Args:
        inner: what such a model gives; it has all else that the server asks of a `Backend`.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.together: int = inner.together

    def parse(self, row: Mapping[str, Any], contract: str = "chat") -> Any:
        """Check a request of the contract `chat` or `prompt`; errors carry `problems`."""
        return self._inner.parse(row, contract)

    def begin(self, wanted: Any) -> BackendReply:
        """Take up a request that `parse` let through."""
        return _FirstReply(self._inner.begin(wanted))

    def kept_bytes(self) -> int:
        """Bytes of key-value cache kept for next turns."""
        return int(self._inner.kept_bytes())

    def abandoned_by(self, event: threading.Event) -> contextlib.AbstractContextManager[None]:
        """While it lasts, what this thread asks the model for ends soon after the event is set."""
        inner: contextlib.AbstractContextManager[None] = self._inner.abandoned_by(event)
        return inner


class _FirstReply:
    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.prompt_tokens: int = inner.prompt_tokens

    @property
    def tokens(self) -> int:
        return int(self._inner.tokens)

    def parts(self) -> Iterator[BackendPart]:
        parts = self._inner.parts()
        try:
            for part in parts:
                yield _Piece(part.index, part.text, part.tokens, part.finish_reason, part.chances)
        finally:
            parts.close()


@dataclass(frozen=True)
class _PlainRequest:
    """A request to a model that knows MLflow's chat schema alone.

    Attributes:
        stop: is not handed to the model: MLflow's own needs files of the logging machine.
        top_p: None where it makes no difference.
    """

    messages: list[dict[str, str]]
    stop: tuple[str, ...]
    max_tokens: int | None
    temperature: float
    top_p: float | None

    def fields(self) -> dict[str, Any]:
        """Return what `predict` takes."""
        given = {
            "messages": self.messages,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
        }
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class _Heard:
    """A piece of an answer, as far as such a model tells it."""

    text: str
    finish_reason: str | None
    prompt_tokens: int
    tokens: int

    @classmethod
    def read(cls, choice: Mapping[str, Any], said: str, answer: Mapping[str, Any]) -> _Heard:
        text = (choice.get(said) or {}).get("content") or ""
        usage = answer.get("usage") or {}
        return cls(
            text,
            choice.get("finish_reason"),
            usage.get("prompt_tokens") or 0,
            usage.get("completion_tokens") or 0,
        )


class MlflowChat:
    """A pyfunc model that knows MLflow's chat schema and nothing more, one request at a time."""

    together = 1

    def __init__(self, model: PyFuncModel) -> None:
        self._model = model
        self._turn = threading.Lock()

    def parse(self, row: Mapping[str, Any], contract: str = "chat") -> _PlainRequest:
        """Check a chat request.

        Raises:
            RequestError: a field is wrong, or such a model cannot honour it.
            ApiError: the contract is not `chat`.
        """
        if contract != "chat":
            raise ApiError(400, "prompt: this model answers chats only", "unsupported", "prompt")
        given = {key: value for key, value in row.items() if value is not None}
        wanted = contract_rules.parse_chat(given, contract_rules.SamplingDefaults(), _ANY_CONTEXT)
        sampling = wanted.sampling
        refused = {
            "n": wanted.n != 1,
            "seed": "seed" in given or "custom_inputs" in given,
            "top_k": sampling.top_k != 0,
            "frequency_penalty": sampling.frequency_penalty != 0,
            "presence_penalty": sampling.presence_penalty != 0,
            "logprobs": wanted.top_logprobs is not None,
            "response_format": wanted.schema is not None,
        }
        problems = [
            f"{name}: this model was logged without the project's runtime and cannot do that"
            for name, wrong in refused.items()
            if wrong
        ]
        if problems:
            raise contract_rules.RequestError(problems)
        return _PlainRequest(
            wanted.messages or [],
            wanted.stop,
            wanted.max_tokens,
            # MLflow's wrapper refuses 0 and samples without a word on it.
            sampling.temperature or _AS_GOOD_AS_GREEDY,
            sampling.top_p if sampling.temperature else None,
        )

    def begin(self, wanted: _PlainRequest) -> _MlflowReply:
        """Take up a request that `parse` let through."""
        return _MlflowReply(self._model, self._turn, wanted)

    def kept_bytes(self) -> int:
        """Bytes kept for next turns: such a model keeps none that could be counted."""
        return 0

    def abandoned_by(self, event: threading.Event) -> contextlib.AbstractContextManager[None]:
        """While it lasts, what this thread asks the model for ends soon after the event is set."""
        return cancellation.abandoned_by(event)


class _MlflowReply:
    def __init__(self, model: PyFuncModel, turn: threading.Lock, wanted: _PlainRequest) -> None:
        self._model = model
        self._turn = turn
        self._stop = StopFinder(wanted.stop)
        self._fields = wanted.fields()
        self.prompt_tokens = 0
        self.tokens = 0

    def parts(self) -> Iterator[BackendPart]:
        left = cancellation.watched()
        with self._turn:
            reason = "stop"
            for heard in self._pieces():
                if left.is_set():  # a model without predict_stream has answered in vain
                    raise cancellation.Abandoned
                reason = heard.finish_reason or reason
                self.prompt_tokens = heard.prompt_tokens or self.prompt_tokens
                self.tokens = heard.tokens or self.tokens
                if shown := self._stop.feed(heard.text):
                    yield _Piece(0, shown, self.tokens)
                if self._stop.found:
                    reason = "stop"
                    break
            if rest := self._stop.rest():
                yield _Piece(0, rest, self.tokens)
            yield _Piece(0, "", self.tokens, reason)

    def _pieces(self) -> Iterator[_Heard]:
        if self._model.metadata.flavors["python_function"].get("streamable"):
            chunk: Any
            for chunk in self._model.predict_stream(self._fields):
                yield _Heard.read((chunk.get("choices") or [{}])[0], "delta", chunk)
            return
        answer: Any = self._model.predict(self._fields)
        answer = answer[0] if isinstance(answer, list) else answer
        yield _Heard.read(answer["choices"][0], "message", answer)
