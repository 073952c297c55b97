"""Ask a logged model the questions of a set, in a process of its own, and measure what it costs.

The process holds nothing but the model, so its peak memory is what serving it takes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from phi3_mlflow.console import Progress
from phi3_mlflow.errors import EnvironmentProblem
from phi3_mlflow.evaluation.checks import check_answer
from phi3_mlflow.evaluation.rows import Question

_BATCH = 4


@dataclass(frozen=True)
class Answer:
    """What a model said to one question.

    Attributes:
        seconds: from the request to the whole answer.
        completion_tokens: how many tokens the answer has.
        finish_reason: `stop`, or `length` when the limit cut it off.
    """

    question_id: str
    category: str
    text: str
    correct: bool
    seconds: float
    completion_tokens: int
    finish_reason: str

    def row(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Answers:
    """All answers of one model, and what it cost."""

    answers: tuple[Answer, ...]
    load_seconds: float
    peak_memory_bytes: int

    def metrics(self) -> dict[str, float]:
        """`accuracy` and `accuracy.CATEGORY` (shares), `tokens_per_second` (median over the
        questions), `endless_rate` (share cut off), `load_time_s`, `peak_memory_bytes`."""
        rates = [a.completion_tokens / a.seconds for a in self.answers if a.completion_tokens]
        metrics = {
            "accuracy": _share(a.correct for a in self.answers),
            "tokens_per_second": statistics.median(rates) if rates else 0.0,
            "endless_rate": _share(a.finish_reason == "length" for a in self.answers),
            "load_time_s": self.load_seconds,
            "peak_memory_bytes": float(self.peak_memory_bytes),
        }
        for category in sorted({a.category for a in self.answers}):
            metrics[f"accuracy.{category}"] = _share(
                a.correct for a in self.answers if a.category == category
            )
        return metrics


def _share(flags: Any) -> float:
    values = list(flags)
    return sum(values) / len(values) if values else 0.0


def ask(model_uri: str, questions: Sequence[Question], progress: Progress) -> Answers:
    """Ask a model every question, greedily.

    Args:
        model_uri: any URI that `mlflow.pyfunc.load_model` takes, of the chat contract.
        questions: what to ask.
        progress: counts the questions.

    Raises:
        EnvironmentProblem: the process that held the model died, most likely for memory.
    """
    import multiprocessing
    from concurrent.futures.process import BrokenProcessPool

    context = multiprocessing.get_context("spawn")
    answers: list[Answer] = []
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            load_seconds = pool.submit(_load, model_uri).result()
            for start in range(0, len(questions), _BATCH):
                batch = list(questions[start : start + _BATCH])
                answers += pool.submit(_ask, batch).result()
                progress.advance(len(batch))
            peak = pool.submit(_peak).result()
    except BrokenProcessPool as error:
        raise EnvironmentProblem(
            f"the process that held {model_uri} died while it was being evaluated; the usual "
            "reason is too little memory. Close other programs, or take a smaller profile."
        ) from error
    return Answers(tuple(answers), load_seconds, peak)


_model: Any = None


def _load(model_uri: str) -> float:
    global _model
    import mlflow

    from phi3_mlflow.tracking import connect

    connect()
    start = time.monotonic()
    _model = mlflow.pyfunc.load_model(model_uri)
    return time.monotonic() - start


def _ask(questions: list[Question]) -> list[Answer]:
    answers = []
    for question in questions:
        request = {
            "messages": [message.model_dump() for message in question.messages],
            "max_tokens": question.max_tokens,
            "temperature": 0.0,
        }
        start = time.monotonic()
        result = _model.predict(request)
        seconds = time.monotonic() - start
        # The transformers flavor answers a list with one element.
        answer = result[0] if isinstance(result, list) else result
        choice = answer["choices"][0]
        text = choice["message"]["content"] or ""
        answers.append(
            Answer(
                question_id=question.id,
                category=question.category,
                text=text,
                correct=check_answer(question.check, text),
                seconds=seconds,
                completion_tokens=int(answer["usage"]["completion_tokens"]),
                finish_reason=str(choice["finish_reason"]),
            )
        )
    return answers


def _peak() -> int:
    from phi3_mlflow.resources import peak_rss_bytes

    return peak_rss_bytes()
