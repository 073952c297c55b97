"""What is made of a model's answers: loops, figures, and the file they are kept in."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, INVALID_PARAMETER_VALUE

from phi3_mlflow.core.endings import ending
from phi3_mlflow.core.errors import EnvironmentProblem, UserError
from phi3_mlflow.evaluation.answers import Answers, repeats
from phi3_mlflow.evaluation.asking import _answered, _Asked, _died, _load, _refuse
from phi3_mlflow.evaluation.items import Question
from phi3_mlflow.evaluation.measurement import Measurement
from tests.evaluation.measurements import answer, measurement
from tests.runtime.scripted import ScriptedEngine, model_on

PROSE = (
    "The harbour was quiet in the early morning, and only the bell of the ferry could be heard. "
    "Nobody had slept much, because the storm had come back twice before the sun rose over the bay."
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I am fine. " * 12, True),
        ("a b c d e f g h " * 4, True),
        (PROSE, False),
        (PROSE + " " + "and so on and so on " * 3, False),  # a stutter, not a loop
        ("yes " * 15, False),  # too short to tell
        ("", False),
        ("\n".join(f"{number}. item number {number}" for number in range(30)), False),
    ],
)
def test_a_loop_is_told_from_prose(text: str, expected: bool) -> None:
    assert repeats(text) == expected


@given(st.text(max_size=300))
def test_whatever_is_said_over_and_over_is_a_loop(text: str) -> None:
    once = " ".join(text.split()[:20])
    assert repeats(" ".join([once] * 40)) == (40 * len(once.split()) >= 16)


def test_the_figures_count_what_they_say() -> None:
    answers = [
        answer(0, seconds=1.0, first_seconds=0.1, completion_tokens=10),
        answer(2, False, seconds=2.0, first_seconds=0.3, completion_tokens=40, repeats=True),
        answer(4, seconds=0.5, first_seconds=None, completion_tokens=1, finish_reason="length"),
        answer(6, False, category="needle_1000", seconds=9.0, finish_reason="length"),
    ]
    metrics = Answers(tuple(answers), 1.5, 7).metrics()
    assert metrics["accuracy"] == pytest.approx(2 / 3), "a needle is no question"
    assert metrics["needle_accuracy"] == metrics["accuracy.needle_1000"] == 0
    assert metrics["accuracy.facts"] == pytest.approx(2 / 3)
    assert metrics["endless_rate"] == metrics["repetition_rate"] == pytest.approx(1 / 3)
    assert metrics["tokens_per_second"] == 15, "one token is no speed"
    assert metrics["tokens_per_second_p95"] == pytest.approx(10.5), "the slow end"
    assert metrics["time_to_first_token_s"] == pytest.approx(0.2)
    assert metrics["latency_s"] == 1
    assert (metrics["load_time_s"], metrics["peak_memory_bytes"]) == (1.5, 7)


def test_without_streaming_there_is_no_time_to_first_token() -> None:
    metrics = Answers((answer(0, first_seconds=None),), 1.0, 1).metrics()
    assert not [name for name in metrics if name.startswith("time_to_first")]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=4))
def test_what_was_measured_is_read_back_whatever_was_said(texts: list[str]) -> None:
    found = measurement([True] * len(texts))
    answers = tuple(replace(a, text=t) for a, t in zip(found.answers, texts, strict=True))
    found = replace(found, answers=answers, sample={"question": "?", "answer": texts[0]})
    with tempfile.TemporaryDirectory() as folder:
        found.write(Path(folder))
        assert Measurement.read(Path(folder)) == found


def test_line_separators_that_json_leaves_as_they_are() -> None:
    odd = "a\u2028b\x85c\x0cd"
    found = measurement([True])
    found = replace(found, answers=(replace(found.answers[0], text=odd),))
    with tempfile.TemporaryDirectory() as folder:
        found.write(Path(folder))
        assert Measurement.read(Path(folder)).answers[0].text == odd


@pytest.mark.parametrize(
    ("code", "kind", "told"),
    [
        (INVALID_PARAMETER_VALUE, UserError, "question q: the model refuses it: too long"),
        (INTERNAL_ERROR, RuntimeError, "question q: OfTheModel: too long"),
    ],
)
def test_an_error_of_a_class_of_the_models_own_reaches_the_parent_process(
    code: int, kind: type[Exception], told: str
) -> None:
    class OfTheModel(MlflowException):
        """Cannot be unpickled where the model is not loaded."""

    class Refusing:
        def answer(self, question: Question) -> None:
            raise OfTheModel("too long", error_code=code)

    asked = [{"role": "user", "content": "?"}]
    question = Question.model_validate(
        {
            "id": "q",
            "category": "facts",
            "messages": asked,
            "check": {"kind": "exact", "value": "a"},
        }
    )
    with pytest.raises(kind) as refused:
        _answered(Refusing(), question)
    assert told in str(pickle.loads(pickle.dumps(refused.value)))  # noqa: S301


def asking(identity: str, content: str, limit: int = 16) -> Question:
    return Question.model_validate(
        {
            "id": identity,
            "category": "facts",
            "messages": [{"role": "user", "content": content}],
            "check": {"kind": "exact", "value": "a"},
            "max_tokens": limit,
        }
    )


class Loaded:
    """What MLflow puts around a model."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def unwrap_python_model(self) -> Any:
        return self.model


def test_what_cannot_be_asked_is_named_before_anything_is_asked() -> None:
    engine = ScriptedEngine("yes")
    asked = _Asked.__new__(_Asked)
    asked.model, asked.prompts = Loaded(model_on(engine)), False
    questions = [
        asking("fits", "Hello"),
        asking("long", "a" * 300),
        asking("much", "a" * 150, 100),
    ]
    refused = [told for question in questions if (told := asked.refused(question))]
    assert [told.partition(":")[0] for told in refused] == ["question long", "question much"]
    assert engine.opened == 0
    with pytest.raises(UserError, match="models:/m/1 refuses 2 of the questions") as error:
        _refuse("models:/m/1", refused)
    assert "question long: messages: 302 tokens leave no room" in str(error.value)
    assert "context of 200" in str(error.value)
    with pytest.raises(UserError, match="and 3 more"):
        _refuse("models:/m/1", ["question q: no"] * 23)
    _refuse("models:/m/1", [])


def test_a_model_of_another_kind_is_just_asked() -> None:
    asked = _Asked.__new__(_Asked)
    asked.model, asked.prompts = Loaded(object()), False
    assert asked.refused(asking("long", "a" * 300)) is None


def die(how: str) -> None:
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "fault":
        os.kill(os.getpid(), signal.SIGUSR1)
    os._exit(3)


@pytest.mark.parametrize(
    ("how", "told", "memory"),
    [
        ("killed", "was killed (SIGKILL)", True),
        ("fault", "was ended by SIGUSR1", False),
        ("by itself", "ended with code 3", False),
    ],
)
def test_memory_is_blamed_only_when_the_system_killed(how: str, told: str, memory: bool) -> None:
    process = multiprocessing.get_context("fork").Process(target=die, args=(how,))
    process.start()
    message = _died("models:/m/1", [process])
    assert f"the process that held models:/m/1 {told}" in message
    assert ("memory" in message) is memory
    assert ending(None) == "ended without a word"


def test_a_model_that_cannot_be_loaded_is_told_without_its_own_classes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class OfTheModel(Exception):
        """Cannot be unpickled where the model is not loaded."""

    def load(*given: object) -> None:
        raise OfTheModel("no weights")

    monkeypatch.setattr("phi3_mlflow.evaluation.asking.connect", lambda: "")
    monkeypatch.setattr("phi3_mlflow.evaluation.asking._Asked", load)
    with pytest.raises(EnvironmentProblem) as error:
        _load("models:/m/1")
    kept = pickle.loads(pickle.dumps(error.value))  # noqa: S301
    assert str(kept) == "models:/m/1 cannot be loaded: OfTheModel: no weights"
