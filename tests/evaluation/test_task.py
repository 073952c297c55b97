"""The task of a fine-tuned checkpoint: rows as questions, what makes an answer right, the loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3_mlflow.core.errors import UserError
from phi3_mlflow.core.progress import no_progress
from phi3_mlflow.evaluation.baseline import measure_checkpoint
from phi3_mlflow.evaluation.checks import ExactCheck, check_answer, describe
from phi3_mlflow.evaluation.divergence import compare, cut, tokenize
from phi3_mlflow.evaluation.items import HeldoutText, Question
from phi3_mlflow.evaluation.reference import answer_all
from phi3_mlflow.evaluation.sets import Sets
from phi3_mlflow.evaluation.streamed import open_logits, streamed
from phi3_mlflow.evaluation.task import check_for, pieces_of, read_task, task_scores
from phi3_mlflow.training.conversations import Conversation, Message
from phi3_mlflow.training.task import write_validation
from tests.fixtures.tiny_phi3 import make_tiny

ANSWERS = ['{"team": "billing", "n": 1}', "Billing, please.", "[1, 2]", "42", "?"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random checkpoint, as training leaves one: with the rows that were set aside."""
    folder = tmp_path_factory.mktemp("task") / "checkpoint"
    make_tiny(folder, "phi-3-mini-4k")
    rows = [conversation(f"Ticket {i}: it broke.", ANSWERS[i % 5]) for i in range(30)]
    write_validation(folder, rows, {row.id for row in rows})
    return folder


def conversation(asked: str, answered: str) -> Conversation:
    return Conversation.of([Message("user", asked), Message("assistant", answered)])


def test_every_row_becomes_a_question_that_its_own_answer_is_right_for(checkpoint: Path) -> None:
    task = read_task(checkpoint, "auto", 200)
    assert task is not None
    assert len(task.questions) == len(task.rows) == 30
    for number, question in enumerate(task.questions):
        assert question.category == "task"
        assert [m.role for m in question.messages] == ["user"]
        assert check_answer(question.check, ANSWERS[number % 5])
        assert not check_answer(question.check, "something else")


def test_which_rows_are_taken_depends_on_their_content(checkpoint: Path, tmp_path: Path) -> None:
    few = read_task(checkpoint, "auto", 20)
    assert few is not None
    chosen = [question.id for question in few.questions]
    assert len(chosen) == 20
    lines = (checkpoint / "validation.jsonl").read_text().splitlines()
    copy = tmp_path / "copy"
    make_tiny(copy, "phi-3-mini-4k")
    (copy / "validation.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    other = read_task(copy, "auto", 20)
    assert other is not None
    assert [question.id for question in other.questions] == chosen[::-1]


def test_a_checkpoint_that_was_not_fine_tuned_has_no_task(tmp_path: Path) -> None:
    assert read_task(tmp_path, "auto", 200) is None


def test_a_row_may_bring_its_own_check(tmp_path: Path) -> None:
    make_tiny(tmp_path / "c", "phi-3-mini-4k")
    row = {
        "id": "one",
        "messages": [
            {"role": "user", "content": "How many?"},
            {"role": "assistant", "content": "There are 7."},
        ],
        "check": {"kind": "numeric", "value": 7},
    }
    (tmp_path / "c/validation.jsonl").write_text(json.dumps(row) + "\n")
    task = read_task(tmp_path / "c", "auto", 200)
    assert task is not None
    assert check_answer(task.questions[0].check, "I counted 7 of them")


def test_rows_that_are_not_as_training_leaves_them_are_refused(tmp_path: Path) -> None:
    (tmp_path / "validation.jsonl").write_text('{"id": 3}\n')
    with pytest.raises(UserError, match="not as training leaves it"):
        read_task(tmp_path, "auto", 200)


def test_json_where_the_wanted_answer_is_none_is_refused(checkpoint: Path) -> None:
    with pytest.raises(UserError, match=r"evaluation.task_check is json.*Billing, please"):
        read_task(checkpoint, "json", 200)


@pytest.mark.parametrize(
    ("wanted", "given", "right"),
    [
        ('{"a": 1, "b": null}', '{"b":null,\n "a":1.0}', True),
        ('{"a": 1, "b": null}', '```json\n{"a": 1, "b": null}\n```', True),
        ('{"a": 1, "b": null}', '{"a": 1}', False),
        ('{"a": 1, "b": null}', '{"a": true, "b": null}', False),
        ('{"a": 1, "b": null}', 'Sure: {"a": 1, "b": null}', False),
        ('{"a": 1, "b": null}', '{"a": 1, "b": null, "c": 2}', False),
        ("[1, 2]", "[2, 1]", False),
        ("Billing.", " Billing.\n", True),
        ("Billing.", "billing", False),
        ("42", "42", True),
        ("42", "42.0", False),
    ],
)
def test_when_an_answer_is_right(wanted: str, given: str, right: bool) -> None:
    assert check_answer(check_for(wanted, "auto"), given) is right


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@given(JSON, JSON)
def test_json_answers_are_right_exactly_when_the_values_are_equal(one: Any, other: Any) -> None:
    check = check_for(json.dumps(one), "json")
    assert check_answer(check, json.dumps(one, indent=1))
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert check_answer(check, json.dumps(other)) is same


@given(st.text(min_size=1).filter(str.strip))
def test_the_same_text_is_right_whatever_it_is(wanted: str) -> None:
    assert check_answer(check_for(wanted, "text"), wanted)
    assert not check_answer(check_for(wanted, "text"), f"{wanted} or not")


def test_an_identical_answer_is_described_as_such() -> None:
    assert describe(ExactCheck(kind="exact", value="?", mode="identical")) == "exactly ?"


def test_the_loss_is_that_of_transformers_on_the_tokens_that_carry_it(checkpoint: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    task = read_task(checkpoint, "auto", 200)
    assert task is not None
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    for batch in (0, 500):  # one row at a time, and many
        with open_logits(checkpoint, pieces_of(task.rows)) as source:
            scores = task_scores(source, task.rows, batch)
        for row, score in zip(task.rows, scores, strict=True):
            labels = [t if m else -100 for t, m in zip(row.input_ids, row.loss_mask, strict=True)]
            with torch.inference_mode():
                ids = torch.tensor([row.input_ids])
                loss = model(ids, labels=torch.tensor([labels])).loss.item()
            assert score.tokens == sum(row.loss_mask)
            assert score.nll / score.tokens == pytest.approx(loss, rel=1e-4)


def questions(count: int) -> list[Question]:
    return [
        Question.model_validate(
            {
                "id": f"q{i}",
                "category": "facts",
                "messages": [{"role": "user", "content": "Say it again. " * (i + 1)}],
                "check": {"kind": "exact", "value": "never"},
                "max_tokens": 4 + i,
            }
        )
        for i in range(count)
    ]


def test_answers_in_batches_are_those_of_one_at_a_time(checkpoint: Path) -> None:
    asked = questions(5)
    with no_progress("", None) as meter:
        together = answer_all(checkpoint, asked, meter)
        alone = [answer_all(checkpoint, [question], meter)[0] for question in asked]
    assert [a.question_id for a in together] == [q.id for q in asked]
    assert [(a.text, a.completion_tokens, a.finish_reason, a.prompt_tokens) for a in together] == [
        (a.text, a.completion_tokens, a.finish_reason, a.prompt_tokens) for a in alone
    ]
    assert all(a.completion_tokens <= q.max_tokens for a, q in zip(together, asked, strict=True))


def test_a_checkpoint_is_measured_as_a_version_is(checkpoint: Path) -> None:
    task = read_task(checkpoint, "auto", 200)
    texts = [HeldoutText(id=f"t{i}", text="Once upon a time. " * (9 + i)) for i in range(3)]
    found = measure_checkpoint(checkpoint, Sets(questions(3), texts, task=task), 64)
    assert found.metrics["accuracy"] == 0
    assert found.metrics["task_accuracy"] == 0
    assert len(found.answers) == 3
    assert len(found.task_answers) == len(found.task_scores) == 30
    tokens = tokenize(checkpoint, [(text.id, text.text) for text in texts])
    with streamed(checkpoint, [ids for _, ids in cut(tokens, 64)]) as source:
        same = compare(source, source, tokens, 64)
    assert found.metrics["perplexity"] == pytest.approx(same.metrics()["perplexity"], rel=1e-5)
    np.testing.assert_allclose(
        [s.candidate_nll for s in found.scores], [s.candidate_nll for s in same.scores], rtol=1e-5
    )


def test_without_texts_and_questions_only_the_task_is_measured(checkpoint: Path) -> None:
    found = measure_checkpoint(
        checkpoint, Sets([], [], task=read_task(checkpoint, "auto", 200)), 64
    )
    assert set(found.metrics) == {"task_accuracy", "task_loss"}
