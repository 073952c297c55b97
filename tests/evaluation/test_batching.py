"""Which questions are asked together, and that they get the answers they get alone."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.models import Model

from phi3_mlflow.core import console
from phi3_mlflow.core.errors import UserError
from phi3_mlflow.evaluation import asking, batching
from phi3_mlflow.evaluation.answers import NEEDLE, Answers
from phi3_mlflow.evaluation.asking import ask
from phi3_mlflow.evaluation.batching import (
    CACHE_BYTES,
    LARGE_BYTES,
    Asking,
    Expected,
    Pace,
    asked_alone,
    expected,
    is_large,
    room_for_batch,
    rows_that_fit,
    rows_together,
)
from phi3_mlflow.evaluation.items import Question
from phi3_mlflow.evaluation.paired import compare_metric
from phi3_mlflow.evaluation.report.build import timed_answers
from phi3_mlflow.evaluation.settings import EvaluationSettings, Margin
from phi3_mlflow.flavors import bundle
from phi3_mlflow.flavors.onnx import _OnnxFlavor
from phi3_mlflow.genai import kept
from phi3_mlflow.runtime.genai_config import GenaiConfig
from tests.conftest import Workspace
from tests.evaluation.measurements import answer, measurement
from tests.fixtures.tiny_checkpoints import checkpoint, onnx_dir

__all__ = ["checkpoint", "onnx_dir"]


def question(name: str, text: str = "Once upon a time", **more: Any) -> Question:
    given = {
        "id": name,
        "category": "facts",
        "messages": [{"role": "user", "content": text}],
        "check": {"kind": "exact", "value": "yes"},
        "max_tokens": 12,
    }
    return Question.model_validate({**given, **more})


QUESTIONS = [
    *(question(f"q{i}", f"Say {'it again ' * (i % 5)}{i}", max_tokens=4 + i) for i in range(9)),
    question("long", "hay " * 200, category=f"{NEEDLE}200"),
    question("row", category="task"),
]


@pytest.mark.parametrize(
    ("batch", "size", "large"),
    [
        ("auto", LARGE_BYTES - 1, False),
        ("auto", LARGE_BYTES, True),
        (1, 10 * LARGE_BYTES, False),
        (2, 1000, True),
    ],
)
def test_the_size_decides_unless_the_profile_does(batch: Any, size: float, large: bool) -> None:
    assert is_large(Asking(batch), size) is large


@pytest.mark.parametrize("wrong", [0, 65, 2.5, "many"])
def test_what_the_profile_may_say(wrong: Any) -> None:
    assert EvaluationSettings.model_validate({"batch": 8}).batch == 8
    assert EvaluationSettings().batch == "auto"
    with pytest.raises(ValueError, match="batch"):
        EvaluationSettings.model_validate({"batch": wrong})


@given(
    st.lists(st.integers(1, 5000), max_size=30),
    st.integers(1, 16),
    st.integers(1, 10**6),
    st.integers(0, 10**10),
)
def test_whichever_are_answered_together_fit(
    lengths: list[int], most: int, token_bytes: int, room: int
) -> None:
    rows = rows_that_fit(lengths, most, token_bytes, room)
    assert 1 <= rows <= most
    longest = sorted(lengths, reverse=True)
    assert rows == 1 or 2 * token_bytes * sum(longest[:rows]) <= room
    if rows < min(most, len(lengths)):
        assert 2 * token_bytes * sum(longest[: rows + 1]) > room, "one more had fitted"


def test_the_room_is_what_the_weights_leave_within_a_bound() -> None:
    assert room_for_batch(3e9, None) == CACHE_BYTES
    assert room_for_batch(3e9, 10**12) == CACHE_BYTES
    assert room_for_batch(3e9, 7 * 10**9) == 5 * 10**8
    assert room_for_batch(3e9, 10**9) == 0


def test_the_same_few_are_asked_alone_every_time() -> None:
    chosen = asked_alone(QUESTIONS, 3)
    assert chosen == {"q0", "q3", "q6", "long"}, "long prompts too, rows of a task not"
    assert asked_alone(QUESTIONS, 100) == {q.id for q in QUESTIONS} - {"row"}
    assert asked_alone([], 3) == frozenset()


def test_what_a_question_takes_is_foreseen(checkpoint: Path) -> None:
    takes = expected(checkpoint, QUESTIONS)
    assert [one.answer for one in takes] == [q.max_tokens for q in QUESTIONS]
    assert takes[9].prompt > 200 > takes[0].prompt > 0


def test_only_what_computes_answers_together_is_asked_so(
    checkpoint: Path, onnx_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert rows_together(Asking(4), checkpoint, [30] * 9) == 1, "transformers"
    assert rows_together(Asking(4), onnx_dir, [30] * 9) == 4
    assert rows_together(Asking(), onnx_dir, [30] * 9) == 1, "small"
    monkeypatch.setattr(batching, "size_of", lambda folder: 2e9)
    monkeypatch.setattr(batching, "available_memory", lambda: None)
    assert rows_together(Asking(), onnx_dir, [30] * 9) == batching.TOGETHER
    monkeypatch.setattr(batching, "available_memory", lambda: 4 * 10**9)
    assert rows_together(Asking(), onnx_dir, [30] * 9) == 1, "no room for a second one"


def test_keys_and_values_in_int8_have_room_for_more(
    onnx_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = 2 * 4 * GenaiConfig.read(onnx_dir).decoder.token_values * 30 * 2
    monkeypatch.setattr(batching, "room_for_batch", lambda size, free: room)
    assert rows_together(Asking(8), onnx_dir, [30] * 9) == 2
    monkeypatch.setattr(kept, "kv_cache", lambda folder: "int8")
    assert rows_together(Asking(8), onnx_dir, [30] * 9) == 8


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("reading", "answering"), [(850.0, 126.0), (20.0, 5.0), (200.0, 5.0)])
def test_the_time_left_is_foreseen_before_the_first_long_prompt(
    reading: float, answering: float, seed: int
) -> None:
    chance = random.Random(seed)
    takes = [Expected(chance.randint(20, 120), chance.randint(16, 128)) for _ in range(240)]
    takes += [Expected(chance.randint(1000, 7000), 32) for _ in range(24)]
    answers = []
    for place, one in enumerate(takes):
        first, made = one.prompt / reading, round(chance.uniform(0.2, 1) * one.answer)
        whole = first + made / answering
        answers.append(answer(place, seconds=whole, first_seconds=first, completion_tokens=made))
    pace, longest = Pace(), max(one.seconds for one in answers)
    left = sum(one.seconds for one in answers)
    passed = 0.0
    for place, (one, said) in enumerate(zip(takes, answers, strict=True)):
        pace.note(one, said)
        left, passed = left - said.seconds, passed + said.seconds
        found = pace.left(takes[place + 1 :])
        if passed > 60:
            assert found <= 2 * left + longest
            assert left <= 2 * found + longest
    assert found == 0


def test_answers_in_one_piece_tell_a_pace_too() -> None:
    pace = Pace()
    pace.note(Expected(50, 10), answer(0, seconds=4.0, first_seconds=None))
    assert pace.left([Expected(50, 10)] * 3) == 12


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("gain", [1.0, 1.7, 3.0])
def test_the_time_left_together_is_foreseen_from_what_they_take_alone(
    gain: float, seed: int
) -> None:
    chance = random.Random(seed)
    takes = [Expected(chance.randint(20, 120), chance.randint(16, 128)) for _ in range(48)]
    made = [round(chance.uniform(0.2, 1) * one.answer) for one in takes]
    reading, answering, rows = 30.0, 5.0, 7
    pace = Pace()
    assert pace.left_together(takes[:1], takes[1:2], takes[2:], 1.0) is None
    for place in range(0, 48, 6):
        first = takes[place].prompt / reading
        whole = first + made[place] / answering
        seen = answer(place, seconds=whole, first_seconds=first, completion_tokens=made[place])
        pace.note(takes[place], seen)
    others = sorted((i for i in range(48) if i % 6), key=lambda i: -takes[i].work)
    # Rows that are computed together: a step is one token of each, a prompt is read by itself.
    waiting, running, ended, now = list(others), {}, [], 0.0
    while waiting or running:
        while waiting and len(running) < rows:
            number = waiting.pop(0)
            now += takes[number].prompt / reading
            running[number] = made[number]
        now += max(1.0, len(running) / gain) / answering
        for number in list(running):
            running[number] -= 1
            if running[number] <= 0:
                del running[number]
                ended.append((now, number))
    for count, (then, _) in enumerate(ended[:-1], start=1):
        done = {number for _, number in ended[:count]}
        still = [takes[number] for number in others if number not in done]
        finished = [takes[number] for number in done]
        found = pace.left_together(finished, still[:rows], still[rows:], then)
        assert found is not None
        if then > 60:
            slack = now / 10
            assert found <= 2 * (now - then) + slack
            assert now - then <= 2 * found + slack


@pytest.fixture(scope="module")
def logged(onnx_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("logged") / "model"
    config = bundle.checked_config({"threads": 1, "model_name": "tiny"})
    _OnnxFlavor().save_model(
        str(folder), Model(), onnx_dir, "chat", config, None, None, None, False,
        pip_requirements=["mlflow"],
    )  # fmt: skip
    return folder


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The processes that answer are threads of this one; the list says how many there were."""
    begun = []

    @contextmanager
    def thread(model_uri: str) -> Iterator[ThreadPoolExecutor]:
        begun.append(model_uri)
        with ThreadPoolExecutor(1) as pool:
            yield pool

    monkeypatch.setattr(asking, "_process", thread)
    monkeypatch.setattr(asking, "LoadWatch", lambda: SimpleNamespace(others=lambda: None))
    monkeypatch.setattr(asking, "connect", lambda: None)
    return begun


def asked(
    logged: Path, checkpoint: Path, how: Asking, some: Sequence[Question] = QUESTIONS
) -> Answers:
    return ask(str(logged), logged / "artifacts" / "onnx", some, checkpoint, how, uncounted=1)


def test_the_answers_are_those_that_are_given_one_at_a_time(
    logged: Path, checkpoint: Path, here: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    some = [question("sample"), *QUESTIONS]
    alone = asked(logged, checkpoint, Asking(), some)
    assert len(here) == 1, "a small model: as ever"
    assert all(a.alone for a in alone.answers)
    assert "timed_answers" not in alone.metrics()
    console.set_quiet(False)
    capsys.readouterr()
    together = asked(logged, checkpoint, Asking(batch=4, timed=3), some)
    shown = capsys.readouterr().err
    assert "4 questions are asked one at a time, for speed and memory, 7 up to 4 together" in shown
    assert "questions, one at a time: 4 of 4 answered (100 %)" in shown, "the sample is not counted"
    assert "questions, up to 4 together: 7 of 7 answered (100 %)" in shown
    assert len(here) == 3
    for one, other in zip(alone.answers, together.answers, strict=True):
        timeless = {"seconds": 0.0, "first_seconds": None, "alone": True}
        assert replace(one, **timeless) == replace(other, **timeless)
    assert {a.question_id for a in together.answers if a.alone} == {
        "sample", "q0", "q3", "q6", "long",
    }  # fmt: skip
    assert together.metrics()["timed_answers"] == 4


@pytest.mark.slow
def test_those_asked_alone_have_a_process_of_their_own(
    logged: Path, checkpoint: Path, workspace: Workspace
) -> None:
    found = asked(logged, checkpoint, Asking(batch=4, timed=3), [question("sample"), *QUESTIONS])
    assert found.metrics()["timed_answers"] == 4
    assert found.peak_memory_bytes > 5e7
    assert found.load_seconds > 0
    beyond = question("beyond", "a b " * 2000, max_tokens=4096, category="task")
    with pytest.raises(UserError, match="question beyond: "):
        asked(logged, checkpoint, Asking(4, 3), [question("sample"), *QUESTIONS, beyond])


def test_a_question_that_is_refused_ends_it_by_name(
    logged: Path, checkpoint: Path, here: list[str]
) -> None:
    some = [*QUESTIONS, question("beyond", "a b " * 2000, max_tokens=4096, category="task")]
    with pytest.raises(UserError, match="question beyond: "):
        asked(logged, checkpoint, Asking(batch=4, timed=3), [question("sample"), *some])


def test_times_are_those_of_the_questions_asked_alone() -> None:
    slow = {"seconds": 100.0, "first_seconds": 50.0, "alone": False}
    metrics = Answers((answer(0), answer(1, **slow), answer(2, **slow)), 1.0, 7).metrics()
    assert metrics["tokens_per_second"] == 50
    assert metrics["time_to_first_token_s"] == 0.1
    assert metrics["latency_s"] == metrics["latency_p95_s"] == 1.0
    assert metrics["timed_answers"] == 1
    assert timed_answers([answer(0), answer(1, **slow)]) == {"asked": 2, "timed": 1}


@pytest.mark.parametrize("metric", ["tokens_per_second", "time_to_first_token_s"])
def test_times_are_compared_on_the_questions_that_both_were_asked_alone(metric: str) -> None:
    found = measurement([True] * 40)
    slow = replace(
        found,
        answers=tuple(
            replace(a, seconds=99.0, first_seconds=99.0, alone=False) if i % 2 else a
            for i, a in enumerate(found.answers)
        ),
    )
    compared = compare_metric(metric, Margin(percent=1), slow, found)
    assert compared.state == "not worse", "20 of them were asked alone, and are as fast"
    few = replace(found, answers=tuple(replace(a, alone=False) for a in found.answers))
    assert compare_metric(metric, Margin(percent=1), few, found).state == "undecided"
