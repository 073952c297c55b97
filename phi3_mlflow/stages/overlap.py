"""Training rows that are also among what the model is measured with: found, and refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phi3_mlflow.config.parameters import AUTO
from phi3_mlflow.core import console
from phi3_mlflow.core.errors import UserError, problem_list
from phi3_mlflow.evaluation import datasets
from phi3_mlflow.training.overlap import Text, find_overlaps, texts_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from phi3_mlflow.config.profile import Profile
    from phi3_mlflow.training.data import TrainingData

_LISTED = 20


def refuse_overlap(profile: Profile, data: TrainingData, *, allowed: bool) -> None:
    """Compare the rows with those they are validated with, and with the evaluation sets.

    Args:
        profile: says what the model is measured on; of the sets that come in sizes, the whole.
        data: the rows.
        allowed: say what is found, and go on.

    Raises:
        UserError: training rows that equal or nearly equal something else; names them.
    """
    texts = [*texts_of(data.validation), *_measured_with(profile)]
    found = find_overlaps(data.train, texts)
    if not found:
        return
    listed = [str(overlap) for overlap in found[:_LISTED]]
    if len(found) > _LISTED:
        listed.append(f"and {len(found) - _LISTED:,} more")
    message = problem_list(
        "Rows to train on are among those that measure the model",
        listed,
        "What it has seen says nothing about what it has learnt. Take them out of one of the two, "
        "or set train.allow_overlap.",
    )
    if not allowed:
        raise UserError(message)
    console.say(f"  {len(found)} training rows are among those that measure the model, as allowed")


def _measured_with(profile: Profile) -> Iterator[Text]:
    chosen = profile.evaluation
    for question in datasets.load_questions(
        None if chosen.questions == AUTO else chosen.questions, quick=False
    ):
        asked = "\n".join(m.content for m in question.messages if m.role == "user")
        yield Text(f"question {question.id}", asked)
    for text in datasets.load_heldout(None if chosen.texts == AUTO else chosen.texts, quick=False):
        yield Text(f"text {text.id}", text.text)
