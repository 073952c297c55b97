"""What a model is measured on: questions, held-out texts, long prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from phi3_mlflow.evaluation.datasets import digest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phi3_mlflow.evaluation.items import HeldoutText, Needle, Question

_TEMPLATE_ROOM = 64  # tokens that a chat template adds to a long prompt, at most


@dataclass(frozen=True)
class Sets:
    """What a model is measured on.

    Attributes:
        questions: with checkable answers.
        texts: held-out documents, for perplexity and divergence.
        needles: recipes of long prompts.
        context: tokens that fit the model; needles beyond it are left out.
    """

    questions: Sequence[Question]
    texts: Sequence[HeldoutText]
    needles: Sequence[Needle] = ()
    context: int = 0

    def digests(self) -> dict[str, str]:
        """The fingerprints of what a model is really asked, as hex."""
        return {
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
