"""The answers of a model to questions, and the figures that they make."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from phi3_mlflow.evaluation.load import LIMIT, OTHER_LOAD
from phi3_mlflow.evaluation.statistics import quantile
from phi3_mlflow.evaluation.wrong import why_wrong

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from phi3_mlflow.evaluation.items import Question

_LOOP_WORDS = 4  # a loop is told by runs of this many words that were there before
_LOOP_SHARE = 0.4
_SHORT_ANSWER = 16  # words; a shorter answer has no room for a loop
NEEDLE = "needle_"
"""Categories of long prompts begin with this; they are counted apart from the questions."""

FEWEST_TIMED = 8
"""Questions that tell a model's speed: with fewer that nothing disturbed, some are asked again."""

TASK = "task"
"""Category of the questions that validation rows become; they are counted apart, too."""

TOKENS_TO_SPARE = 32
"""An answer to one of them may be so much longer than what is wanted before it is cut off."""


@dataclass(frozen=True)
class Answer:
    """What a model said to one question.

    Attributes:
        seconds: from the request to the whole answer.
        first_seconds: from the request to the first piece, None when it could not be streamed.
        completion_tokens: how many tokens the answer has.
        finish_reason: `stop`, or `length` when the limit cut it off.
        repeats: the answer goes round in circles.
        why_wrong: what its check says against it; empty of a right answer.
        alone: nothing else was answered meanwhile, so that its times are those of a single request.
        others: share of the processor that other programs used meanwhile; None where that is not
            known.
    """

    question_id: str
    category: str
    text: str
    correct: bool
    seconds: float
    first_seconds: float | None
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str
    repeats: bool
    why_wrong: str = ""
    alone: bool = True
    others: float | None = None

    def row(self) -> dict[str, Any]:
        """The answer as `answers.jsonl` holds it."""
        return asdict(self)

    @property
    def disturbed(self) -> bool:
        """Whether other programs computed meanwhile, so that its times are not the model's."""
        return self.others is not None and self.others > LIMIT

    @property
    def rate(self) -> float:
        """Tokens per second over the whole answer."""
        return self.completion_tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Answers:
    """All answers of one model, and what it cost."""

    answers: tuple[Answer, ...]
    load_seconds: float
    peak_memory_bytes: int

    def metrics(self) -> dict[str, float]:
        """What `phi3_mlflow.evaluation.metrics` names, as far as answers tell it.

        `accuracy`, the rates and the speeds count the questions; long prompts with a needle are in
        `needle_accuracy` and in `accuracy.CATEGORY` only. Speeds and times are those of the
        questions that were asked one at a time and that nothing disturbed, `timed_answers` of them
        if they are not all; where too much was disturbed, of all that were asked one at a time.
        """
        asked = [a for a in self.answers if not a.category.startswith(NEEDLE)]
        needles = [a for a in self.answers if a.category.startswith(NEEDLE)]
        timed = undisturbed([a for a in asked if a.alone])
        # One token does not tell a speed: it is all waiting for the prompt.
        rates = [a.rate for a in timed if a.completion_tokens > 1]
        first = [a.first_seconds for a in timed if a.first_seconds is not None]
        metrics = {
            "accuracy": _share([a.correct for a in asked]),
            "tokens_per_second": quantile(rates, 0.5),
            "tokens_per_second_p95": quantile(rates, 0.05),
            "tokens_per_second_spread": spread(rates),
            "latency_s": quantile([a.seconds for a in timed], 0.5),
            "latency_p95_s": quantile([a.seconds for a in timed], 0.95),
            "endless_rate": _share([a.finish_reason == "length" for a in asked]),
            "repetition_rate": _share([a.repeats for a in asked]),
            "load_time_s": self.load_seconds,
            "peak_memory_bytes": float(self.peak_memory_bytes),
        }
        if len(timed) < len(asked):
            metrics["timed_answers"] = float(len(timed))
        if (load := other_load(timed)) is not None:
            metrics[OTHER_LOAD] = load
        if first:
            metrics["time_to_first_token_s"] = quantile(first, 0.5)
            metrics["time_to_first_token_p95_s"] = quantile(first, 0.95)
        if needles:
            metrics["needle_accuracy"] = _share([a.correct for a in needles])
        for category in sorted({a.category for a in self.answers}):
            right = [a.correct for a in self.answers if a.category == category]
            metrics[f"accuracy.{category}"] = _share(right)
        return metrics


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags) if flags else 0.0


def undisturbed(timed: Sequence[Answer]) -> Sequence[Answer]:
    """Those whose times are the model's own; all where these are too few to tell a speed."""
    sound = [answer for answer in timed if not answer.disturbed]
    return sound if len(sound) >= min(FEWEST_TIMED, len(timed)) else timed


def other_load(answers: Sequence[Answer]) -> float | None:
    """The share of the processor that other programs used during some answers, 0 to 1."""
    known = [(a.others, a.seconds) for a in answers if a.others is not None]
    whole = sum(seconds for _, seconds in known)
    return sum(others * seconds for others, seconds in known) / whole if whole else None


def spread(values: Sequence[float]) -> float:
    """How far the middle half of some values reaches, as a share of their median."""
    middle = quantile(values, 0.5)
    return (quantile(values, 0.75) - quantile(values, 0.25)) / middle if middle else 0.0


def repeats(text: str) -> bool:
    """Whether a text goes round in circles: most of it has been said before, word for word."""
    words = text.lower().split()
    if len(words) < _SHORT_ANSWER:
        return False
    runs = [tuple(words[i : i + _LOOP_WORDS]) for i in range(len(words) - _LOOP_WORDS + 1)]
    return 1 - len(set(runs)) / len(runs) >= _LOOP_SHARE


def judged(answer: Answer, question: Question) -> Answer:
    """The answer with what its question's check says of it."""
    why = why_wrong(question.check, answer.text)
    return replace(answer, correct=not why, why_wrong=why)


def read_answers(file: Path) -> list[Answer]:
    """What `row()` wrote, one JSON object per line."""
    # Not splitlines: it also splits at characters that an answer may hold, such as U+2028.
    return [Answer(**json.loads(line)) for line in file.read_text("utf-8").split("\n") if line]
