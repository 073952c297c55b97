"""What a model is measured on: questions, held-out texts, long prompts, the rows of its task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from phi3_mlflow.evaluation.datasets import digest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phi3_mlflow.evaluation.items import HeldoutText, Needle, Question
    from phi3_mlflow.evaluation.task import Task

_TEMPLATE_ROOM = 64  # tokens that a chat template adds to a long prompt, at most


@dataclass(frozen=True)
class Sets:
    """What a model is measured on.

    Attributes:
        questions: with checkable answers.
        texts: held-out documents, for perplexity and divergence.
        needles: recipes of long prompts.
        context: tokens that fit the model; needles beyond it are left out.
        task: what the model was fine-tuned for, if it was.
    """

    questions: Sequence[Question]
    texts: Sequence[HeldoutText]
    needles: Sequence[Needle] = ()
    context: int = 0
    task: Task | None = None

    def digests(self) -> dict[str, str]:
        """The fingerprints of what a model is really asked, as hex."""
        task = {"task_sha256": self.task.digest()} if self.task else {}
        return task | {
            "questions_sha256": digest(self.questions),
            "texts_sha256": digest(self.texts),
            "needles_sha256": digest(self.fitting()),
        }

    def fitting(self) -> list[Needle]:
        """The long prompts that leave room for an answer."""
        return [
            needle
            for needle in self.needles
            if needle.target_tokens + needle.max_tokens + _TEMPLATE_ROOM <= self.context
        ]
