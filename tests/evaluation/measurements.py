"""Made-up measurements: answers and scores with known differences."""

from __future__ import annotations

from collections.abc import Sequence

from phi3_mlflow.evaluation.answers import Answer, Answers
from phi3_mlflow.evaluation.divergence import Divergence, TextScore
from phi3_mlflow.evaluation.measurement import Measurement


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
