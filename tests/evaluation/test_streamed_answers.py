"""Full precision answers without being loaded, in the same words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from phi3_mlflow.artifacts.cache import StepCache
from phi3_mlflow.core import console
from phi3_mlflow.core.progress import no_progress, show_progress
from phi3_mlflow.evaluation import reference, streamed_answers
from phi3_mlflow.evaluation.answers import Answer
from phi3_mlflow.evaluation.items import Question
from phi3_mlflow.evaluation.reference import answer_all
from phi3_mlflow.evaluation.room import fits_well
from phi3_mlflow.evaluation.streamed_answers import STEP, answer_streamed
from tests.fixtures.tiny_phi3 import make_tiny


def questions(count: int) -> list[Question]:
    return [
        Question.model_validate(
            {
                "id": f"q{i}",
                "category": "facts",
                "messages": [{"role": "user", "content": "Say it again. " * (i % 4 + 1) + str(i)}],
                "check": {"kind": "exact", "value": "never"},
                "max_tokens": 4 + 3 * i,
            }
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("model"), "phi-3-medium-4k")


def ask(checkpoint: Path, some: Sequence[Question], store: StepCache | None = None) -> list[Answer]:
    """The answers without their times."""
    with no_progress("", None) as meter:
        return [replace(a, seconds=0) for a in answer_streamed(checkpoint, some, meter, store)]


def test_answers_are_those_of_transformers(checkpoint: Path, tmp_path: Path) -> None:
    some = questions(6)
    with no_progress("", None) as meter:
        expected = [answer_all(checkpoint, [q], meter)[0] for q in some]
    assert any(a.finish_reason == "length" for a in expected)
    found = ask(checkpoint, some)
    assert found == [replace(a, seconds=0, alone=False, others=None) for a in expected]
    store = StepCache(tmp_path)
    assert ask(checkpoint, some, store) == found
    assert [entry.step for entry in store.entries()] == [STEP]


def test_an_end_token_of_the_contract_ends_an_answer(checkpoint: Path, tmp_path: Path) -> None:
    some = questions(6)
    free = ask(checkpoint, some)
    other = make_tiny(tmp_path / "other", "phi-3-medium-4k")
    vocab = json.loads((other / "tokenizer.json").read_text())["model"]["vocab"]
    spoken = (letter for answer in free for letter in answer.text[1:])
    byte = next(one for one in spoken if one in vocab and one not in "<|spare0123456789>")
    config = {"bos_token_id": 1, "eos_token_id": [2, vocab[byte]], "pad_token_id": 2}
    (other / "generation_config.json").write_text(json.dumps(config))
    found = ask(other, some)
    assert any(a.finish_reason == "stop" for a in found)
    for one, whole in zip(found, free, strict=True):
        assert byte not in one.text
        assert whole.text.startswith(one.text)
    with no_progress("", None) as meter:
        alone = [answer_all(other, [q], meter)[0] for q in some]
    assert found == [replace(a, seconds=0, alone=False, others=None) for a in alone]


def test_it_is_chosen_where_the_model_does_not_fit_well(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fits_well(10, 20)
    assert fits_well(10, None)
    assert not fits_well(11, 20)
    some = questions(2)
    monkeypatch.setattr(reference, "_answer_in_memory", lambda *given: ("in memory",))
    with no_progress("", None) as meter:
        assert answer_all(checkpoint, some, meter) == ("in memory",)
        monkeypatch.setattr(reference, "available_memory", lambda: 10**5)
        console.set_quiet(False)
        assert len(answer_all(checkpoint, some, meter)) == 2
    assert "full precision answers layer by layer" in capsys.readouterr().err


class Killed(BaseException):
    """What a test ends a run with."""


def test_a_killed_run_goes_on_with_the_questions_that_are_left(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    some, store = questions(6), StepCache(tmp_path)
    expected = ask(checkpoint, some)
    asked: list[int] = []
    generation = streamed_answers.Generation

    def begun(decoder: Any, prompts: Sequence[Any], *more: Any) -> Any:
        asked.append(len(prompts))
        made = generation(decoder, prompts, *more)
        run = made.run

        def until(parts: Any, told: Any) -> Any:
            if len(asked) == 1 and len(made.running) == 3:
                raise Killed
            return run(parts, told)

        monkeypatch.setattr(made, "run", until)
        return made

    monkeypatch.setattr(streamed_answers, "Generation", begun)
    with pytest.raises(Killed):
        ask(checkpoint, some, store)
    (left,) = store.downloads.glob(f"{STEP}-*/answers.jsonl")
    with left.open("a") as stream:
        stream.write('{"question_id": "q5", "cat')  # as a kill may leave it
    console.set_quiet(False)
    assert ask(checkpoint, some, store) == expected
    assert asked == [6, 3]
    assert "3 questions were answered before" in capsys.readouterr().err
    assert not list(store.downloads.iterdir())
    assert ask(checkpoint, some, store) == expected
    assert asked == [6, 3], "what is known is not asked"
    other = make_tiny(tmp_path / "other", "phi-3-medium-4k", seed=4)
    assert ask(other, some, store) != expected
    assert ask(checkpoint, some[:2], store) == expected[:2]
    assert asked == [6, 3, 6, 2]


def test_what_is_shown_counts_answers_and_tells_the_time(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("phi3_mlflow.core.progress._LINE_EVERY_SECONDS", 0.0)
    console.set_quiet(False)
    capsys.readouterr()
    with show_progress("full precision", 4, "answered") as meter:
        answer_streamed(checkpoint, questions(4), meter)
    lines = capsys.readouterr().err.splitlines()
    assert " s left" in lines[0]
    assert lines[-1].startswith("  full precision: 4 of 4 answered (100 %)")
    assert " left" not in lines[-1]


@pytest.mark.slow
def test_the_default_answers_as_it_does_in_transformers(real_checkpoint: Path) -> None:
    from phi3_mlflow.evaluation import datasets

    some = [q.model_copy(update={"max_tokens": 24}) for q in datasets.load_questions(quick=True)]
    with no_progress("", None) as meter:
        expected = [answer_all(real_checkpoint, [q], meter)[0] for q in some[:12]]
    found = ask(real_checkpoint, some[:12])
    assert found == [replace(a, seconds=0, alone=False, others=None) for a in expected]
