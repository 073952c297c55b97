"""What a model is measured on: questions, held-out texts, long prompts, the rows of its task."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from phi3_mlflow.evaluation.datasets import digest
from phi3_mlflow.rows.location import DATASET
from phi3_mlflow.tracking.logged_sets import LoggedSet

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phi3_mlflow.evaluation.items import HeldoutText, Needle, Question
    from phi3_mlflow.evaluation.task import Task

_TEMPLATE_ROOM = 64  # tokens that a chat template adds to a long prompt, at most


def set_name(source: str) -> str:
    """What a set of a user's own is called: as its file without the ending, or its data set."""
    return PurePosixPath(source.removeprefix(DATASET)).stem or source


@dataclass(frozen=True)
class Sets:
    """What a model is measured on.

    Attributes:
        questions: with checkable answers.
        texts: held-out documents, for perplexity and divergence.
        needles: recipes of long prompts.
        context: tokens that fit the model; needles beyond it are left out.
        task: what the model was fine-tuned for, if it was.
        questions_name: what the set of questions is called.
        texts_name: what the set of texts is called.
    """

    questions: Sequence[Question]
    texts: Sequence[HeldoutText]
    needles: Sequence[Needle] = ()
    context: int = 0
    task: Task | None = None
    questions_name: str = "questions"
    texts_name: str = "held-out texts"

    def digests(self) -> dict[str, str]:
        """The fingerprints of what a model is really asked, as hex."""
        task = {"task_sha256": self.task.digest()} if self.task else {}
        return task | {
            "questions_sha256": digest(self.questions),
            "texts_sha256": digest(self.texts),
            "needles_sha256": digest(self.fitting()),
        }

    def logged(self) -> list[LoggedSet]:
        """The sets as inputs of a run."""
        digests, long = self.digests(), self.fitting()
        return [
            LoggedSet(self.questions_name, digests["questions_sha256"], self.questions),
            LoggedSet(self.texts_name, digests["texts_sha256"], self.texts),
            LoggedSet("long prompts", digests["needles_sha256"], long),
        ]

    def fitting(self) -> list[Needle]:
        """The long prompts that leave room for an answer."""
        return [
            needle
            for needle in self.needles
            if needle.target_tokens + needle.max_tokens + _TEMPLATE_ROOM <= self.context
        ]
