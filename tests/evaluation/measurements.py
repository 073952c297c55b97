"""Made-up measurements: answers and scores with known differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from phi3_mlflow.evaluation.answers import Answer, Answers
from phi3_mlflow.evaluation.divergence import Divergence, TextScore
from phi3_mlflow.evaluation.measurement import Measurement
from phi3_mlflow.evaluation.task import CATEGORY, TaskScore, task_metrics


def answer(number: int, right: bool = True, **changes) -> Answer:
    values = {
        "question_id": f"q{number}",
        "category": ("facts", "json")[number % 2],
        "text": "yes" if right else "no <script>alert(1)</script>",
        "correct": right,
        "seconds": 1.0 + number / 100,
        "first_seconds": 0.1,
        "prompt_tokens": 9,
        "completion_tokens": 50,
        "finish_reason": "stop",
        "repeats": False,
        **changes,
    }
    return Answer(**values)


def measurement(
    right: Sequence[bool], kl: Sequence[float] = (0.1,) * 9, **metrics: float
) -> Measurement:
    """Answers that are right or wrong as given, and texts of 100 places with the KL given."""
    answers = Answers(tuple(answer(i, flag) for i, flag in enumerate(right)), 1.0, 10**8)
    scores = tuple(
        TextScore(f"t{i}", 100, 300 + 100 * value, 300.0, 100 * value, 80)
        for i, value in enumerate(kl)
    )
    found = {**Divergence(scores).metrics(), **answers.metrics(), "size_bytes": 1e8, **metrics}
    return Measurement(found, answers.answers, scores, {"question": "?", "answer": "!"})


def at_the_task(
    found: Measurement, right: Sequence[bool], loss: Sequence[float] | None = None
) -> Measurement:
    """The same measurement with rows of a task, right or wrong as given, 10 tokens each."""
    losses = loss or [0.1 if flag else 1.0 for flag in right]
    answers = tuple(
        answer(i, flag, question_id=f"row{i}", category=CATEGORY) for i, flag in enumerate(right)
    )
    scores = tuple(TaskScore(f"row{i}", 10, 10 * value) for i, value in enumerate(losses))
    metrics = {**found.metrics, **task_metrics(right, scores)}
    return replace(found, metrics=metrics, task_answers=answers, task_scores=scores)
