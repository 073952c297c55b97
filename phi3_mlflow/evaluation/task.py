"""The task that a checkpoint was fine-tuned for, measured on the rows that training set aside.

Training leaves those rows in the checkpoint's folder. Each becomes a question: the conversation up
to the assistant's last answer, which is what is wanted. An answer is right when it is the same
JSON, where what is wanted is an object or a list, and otherwise when it is the same text; a row may
bring a check of its own. Beside the answers there is the loss, on the same tokens as in training.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from phi3_mlflow.core.errors import UserError
from phi3_mlflow.evaluation.answers import TASK, TOKENS_TO_SPARE
from phi3_mlflow.evaluation.checks import (
    Check,
    ExactCheck,
    JsonCheck,
    StrictModel,
)
from phi3_mlflow.evaluation.datasets import digest
from phi3_mlflow.evaluation.divergence import batches
from phi3_mlflow.evaluation.items import Question
from phi3_mlflow.rows.strict_json import read_json
from phi3_mlflow.training.conversations import Conversation, Message, Role
from phi3_mlflow.training.masking import tokenize_rows
from phi3_mlflow.training.task import VALIDATION

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from phi3_mlflow.evaluation.logits import LogitSource
    from phi3_mlflow.training.masking import TokenizedRow

    Array = NDArray[Any]

CATEGORY = TASK
"""Of the questions that validation rows become; they are counted apart from the others."""

Kind = Literal["auto", "text", "json"]

_LONGEST_ANSWER = 4096  # tokens


@dataclass(frozen=True)
class TaskScore:
    """The loss on one row.

    Attributes:
        row_id: the conversation's.
        tokens: how many carry loss.
        nll: the sum of their negative log-likelihoods, in nats.
    """

    row_id: str
    tokens: int
    nll: float


@dataclass(frozen=True)
class Task:
    """What a fine-tuned checkpoint was trained to do.

    Attributes:
        questions: the rows as questions.
        rows: the same rows as token ids with the loss mask of training, in the same order.
    """

    questions: tuple[Question, ...]
    rows: tuple[TokenizedRow, ...]

    def digest(self) -> str:
        """The fingerprint of the questions, as hex; the token ids follow from the reference."""
        return digest(self.questions)


class _Said(StrictModel):
    role: Role
    content: str


class _Row(StrictModel):
    """A line of `VALIDATION`."""

    id: str
    messages: tuple[_Said, ...]
    check: Check | None = None


def read_task(checkpoint: Path, kind: Kind, most: int) -> Task | None:
    """The task of a fine-tuned checkpoint.

    Args:
        checkpoint: as training left it.
        kind: how answers are compared: `text`, `json`, or `auto`, by what is wanted.
        most: rows that are taken at most; which ones depends on their content alone.

    Returns:
        None when the checkpoint was not fine-tuned, or no rows were set aside.

    Raises:
        UserError: the rows cannot be read, or not be compared in the way that was asked for.
    """
    file = checkpoint / VALIDATION
    if not file.is_file():
        return None
    try:
        lines = [line for line in file.read_text("utf-8").split("\n") if line]
        rows = [_Row.model_validate_json(line) for line in lines]
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not as training leaves it: {error}") from error
    if not rows:
        return None
    # Ids are hashes, so the least of them are a random choice that more rows hardly change.
    taken = {row.id for row in sorted(rows, key=lambda row: row.id)[:most]}
    rows = [row for row in rows if row.id in taken]
    conversations = [
        Conversation.of([Message(said.role, said.content) for said in row.messages], row.id)
        for row in rows
    ]
    tokenized = tokenize_rows(checkpoint, conversations, max_length=sys.maxsize).rows
    questions = [
        _question(row, sum(tokens.loss_mask), kind)
        for row, tokens in zip(rows, tokenized, strict=True)
    ]
    return Task(tuple(questions), tokenized)


def _question(row: _Row, tokens: int, kind: Kind) -> Question:
    """A row as a question.

    Args:
        row: a conversation that ends with the assistant.
        tokens: how many of it carry loss: at least as many as the last answer has.
        kind: how the answer is compared where the row does not say so itself.
    """
    *asked, wanted = row.messages
    try:
        return Question.model_validate(
            {
                "id": row.id,
                "category": CATEGORY,
                "messages": [said.model_dump() for said in asked],
                "check": row.check or check_for(wanted.content, kind),
                "max_tokens": min(tokens + TOKENS_TO_SPARE, _LONGEST_ANSWER),
            }
        )
    except ValidationError as error:
        raise UserError(f"validation row {row.id}: {error.errors()[0]['msg']}") from error


def check_for(wanted: str, kind: Kind) -> Check:
    """What makes an answer right, from the answer that is wanted.

    Args:
        wanted: the assistant's answer in the row.
        kind: `text` is the same text, white space around it aside; `json` the same JSON value,
            however it is written; `auto` takes JSON where an object or a list is wanted.

    Raises:
        UserError: JSON is asked for, and what is wanted is none.
    """
    value: Any = None
    if kind != "text":
        try:
            value = read_json(wanted)
        except (ValueError, RecursionError) as error:
            if kind == "json":
                raise UserError(
                    f"evaluation.task_check is json, and this answer is none: {wanted[:80]!r} "
                    f"({error})"
                ) from error
    if kind == "json" or isinstance(value, (dict, list)):
        # JSON Schema knows when two values are equal: 1 and 1.0 are, 1 and true are not.
        return JsonCheck.model_validate(
            {"kind": "json", "schema": {"enum": [value]}, "strict": True}
        )
    return ExactCheck(kind="exact", value=wanted, mode="identical")


def task_scores(
    source: LogitSource,
    rows: Sequence[TokenizedRow],
    batch_tokens: int,
    advance: Callable[[int], None] = lambda amount: None,
) -> tuple[TaskScore, ...]:
    """The loss of a model on the rows.

    Args:
        source: the model.
        rows: with what carries loss.
        batch_tokens: so many places, padding included, are computed at once.
        advance: is told how many rows are done.
    """
    import numpy as np
    import torch

    pieces = pieces_of(rows)
    scores: dict[int, TaskScore] = {}
    for group in batches([len(piece) for piece in pieces], batch_tokens):
        found = source.logits([pieces[index] for index in group])
        for index, logits in zip(group, found, strict=True):
            row = rows[index]
            carries = np.flatnonzero(row.loss_mask)
            said = torch.from_numpy(np.ascontiguousarray(logits[carries - 1])).double()
            wanted = torch.tensor([row.input_ids[at] for at in carries])[:, None]
            nll = -torch.log_softmax(said, -1).gather(1, wanted).sum().item()
            scores[index] = TaskScore(row.id, len(carries), nll)
        advance(len(group))
    return tuple(scores[index] for index in range(len(rows)))


def pieces_of(rows: Sequence[TokenizedRow]) -> list[Array]:
    """The token ids of rows, int32 (S,) each."""
    import numpy as np

    return [np.asarray(row.input_ids, dtype=np.int32) for row in rows]


def task_metrics(right: Sequence[bool], scores: Sequence[TaskScore]) -> dict[str, float]:
    """`task_accuracy` (share) and `task_loss` (nats per token), as far as they were measured."""
    found = {}
    if right:
        found["task_accuracy"] = sum(right) / len(right)
    if tokens := sum(score.tokens for score in scores):
        found["task_loss"] = sum(score.nll for score in scores) / tokens
    return found


def gain_kept(found: float, base: float, full: float) -> float | None:
    """The share of a gain that quantization has left.

    Args:
        found: accuracy at the task, of the version.
        base: of the untrained base, in full precision.
        full: of the fine-tuned model, in full precision.

    Returns:
        (found - base) / (full - base); None where training gained nothing that could be kept.
    """
    return (found - base) / (full - base) if full > base else None


def training_curve(checkpoint: Path) -> list[dict[str, float]]:
    """How a checkpoint was fine-tuned: the points of `training.json`, none where there is none."""
    try:
        curve = json.loads((checkpoint / "training.json").read_text("utf-8"))["curve"]
    except (OSError, ValueError, KeyError):
        return []
    return [dict(point) for point in curve]
