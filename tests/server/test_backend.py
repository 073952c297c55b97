"""What the server talks to under MLflow's wrapper: each version of the interface, or neither."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
from mlflow.exceptions import MlflowException

from phi3_mlflow.runtime import live
from phi3_mlflow.runtime.cancellation import Abandoned
from phi3_mlflow.server.backend import Backend, FirstInterface, MlflowChat, backend_of
from phi3_mlflow.server.holder import Loaded, Target
from tests.runtime.scripted import ScriptedEngine, model_on
from tests.server.conftest import fixed, running

ASKED = {
    "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9, "n": 2,
    "logprobs": True, "top_logprobs": 2,
}  # fmt: skip


class _FirstPart:
    """A part as models of version 0.1 give it."""

    def __init__(self, part: live.Part) -> None:
        self.index, self.text, self.tokens = part.index, part.text, part.tokens
        self.finish_reason, self.chances = part.finish_reason, part.logprobs


class _FirstReply(live.Reply):
    def parts(self) -> Any:
        for part in super().parts():
            yield _FirstPart(part)


class _FirstLive(live.Live):
    interface = 1

    def begin(self, wanted: Any) -> Any:
        return _FirstReply(self._answerer, self._answerer.prepare(wanted))


class _Wrapped:
    """As much of MLflow's pyfunc wrapper as is looked at."""

    metadata: Any = None

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def unwrap_python_model(self) -> Any:
        if self._inner is None:
            raise MlflowException("not a Python model")
        return self._inner


class _Inner:
    def __init__(self, made: Any) -> None:
        self._made = made

    def live(self) -> Any:
        return self._made


def _model(interface: int) -> Any:
    engine = ScriptedEngine("Good day.")
    answerer = model_on(engine, model_name="m").answerer
    assert answerer is not None
    made = {1: _FirstLive, 2: live.Live}[interface](answerer)
    return _Wrapped(_Inner(made))


def _said(backend: Backend) -> list[tuple[Any, ...]]:
    reply = backend.begin(backend.parse(ASKED))
    parts = [(p.index, p.text, p.tokens, p.finish_reason, p.logprobs) for p in reply.parts()]
    return [*parts, (reply.prompt_tokens, reply.tokens)]


def test_both_interfaces_are_spoken_and_say_the_same() -> None:
    first, second = backend_of(_model(1)), backend_of(_model(2))
    assert type(first) is FirstInterface
    assert type(second) is live.Live
    said = _said(first)
    assert said == _said(second)
    assert any(logprobs for *_, logprobs in said[:-1])
    assert first.kept_bytes() == second.kept_bytes() > 0
    assert first.together == 1


def test_an_unknown_interface_is_not_spoken() -> None:
    model = _model(2)
    model.unwrap_python_model().live().interface = 99
    assert type(backend_of(model)) is MlflowChat
    assert type(backend_of(_Wrapped(None))) is MlflowChat


@pytest.mark.parametrize("interface", [1, 2])
def test_an_answer_can_be_stopped(interface: int) -> None:
    backend, left = backend_of(_model(interface)), threading.Event()
    with backend.abandoned_by(left):
        parts = backend.begin(backend.parse(ASKED)).parts()
        next(parts)
        left.set()
        with pytest.raises(Abandoned):
            list(parts)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_model_of_version_0_1_is_served_like_any_other(streamed: bool) -> None:
    answers = []
    for interface in (1, 2):
        backend = backend_of(_model(interface))
        loaded = Loaded(Target("m", "1", "models:/m/1"), None, backend, 0.0)
        holder = fixed(model_on(ScriptedEngine("x")))
        holder.current = loaded
        with running(holder) as up:
            answer = up.http().post("/v1/chat/completions", json={**ASKED, "stream": streamed})
            assert answer.status_code == 200, answer.text
            lines = [line for line in answer.text.replace("data: [DONE]", "").splitlines() if line]
            answers.append([_without_its_own(line) for line in lines])
    assert answers[0] == answers[1]
    assert '"logprob"' in str(answers[0]).replace("'", '"')


def _without_its_own(line: str) -> Any:
    content = json.loads(line.removeprefix("data: "))
    return {key: value for key, value in content.items() if key not in ("id", "created")}
