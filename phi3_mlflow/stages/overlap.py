"""What is trained on and also among what the model is measured with: refused, or left out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phi3_mlflow.config.parameters import AUTO
from phi3_mlflow.core import console
from phi3_mlflow.core.errors import UserError, problem_list
from phi3_mlflow.evaluation import datasets
from phi3_mlflow.training.conversations import Conversation, Message
from phi3_mlflow.training.overlap import Text, find_overlaps, texts_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

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


def without_overlap(
    profile: Profile, data: TrainingData, texts: Sequence[str | list[dict[str, str]]]
) -> list[str | list[dict[str, str]]]:
    """Texts to rehearse, without those that the model is validated or measured with.

    Args:
        profile: says what the model is measured on.
        data: the rows.
        texts: texts and conversations.
    """
    measured = [*texts_of(data.validation), *_measured_with(profile)]
    found = find_overlaps([_as_row(text, str(at)) for at, text in enumerate(texts)], measured)
    aside = {int(overlap.where) for overlap in found}
    if aside:
        console.say(
            f"  {len(aside)} of the {len(texts)} texts to rehearse are among those that measure "
            "the model, and are left out"
        )
    return [text for at, text in enumerate(texts) if at not in aside]


def _as_row(text: str | list[dict[str, str]], where: str) -> Conversation:
    """A text as a row in which somebody says it, to compare it like one."""
    said = text if isinstance(text, list) else [{"role": "user", "content": text}]
    users = [Message("user", message["content"]) for message in said if message["role"] == "user"]
    return Conversation.of(users, where)


def _measured_with(profile: Profile) -> Iterator[Text]:
    chosen = profile.evaluation
    for question in datasets.load_questions(
        None if chosen.questions == AUTO else chosen.questions, quick=False
    ):
        asked = "\n".join(m.content for m in question.messages if m.role == "user")
        yield Text(f"question {question.id}", asked)
    for text in datasets.load_heldout(None if chosen.texts == AUTO else chosen.texts, quick=False):
        yield Text(f"text {text.id}", text.text)
