"""Ask a logged model the questions of a set, in a process of its own, and measure what it costs.

The process holds nothing but the model, so its peak memory is what serving it takes. Answers are
streamed where the model can, for the time to the first piece.
"""

from __future__ import annotations

import json
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from phi3_mlflow.core.endings import code_of, ending
from phi3_mlflow.core.errors import EnvironmentProblem, ProjectError, UserError, problem_list
from phi3_mlflow.core.meter import peak_rss_bytes
from phi3_mlflow.evaluation.logits import find_model
from phi3_mlflow.evaluation.statistics import quantile
from phi3_mlflow.evaluation.wrong import why_wrong
from phi3_mlflow.tracking.connection import connect
from phi3_mlflow.tracking.stored_files import local_files

if TYPE_CHECKING:
    from collections.abc import Sequence
    from multiprocessing.process import BaseProcess
    from pathlib import Path

    from phi3_mlflow.core.progress import Meter
    from phi3_mlflow.evaluation.items import Question

_BATCH = 4
_MOST_TOLD = 20
_LOOP_WORDS = 4  # a loop is told by runs of this many words that were there before
_LOOP_SHARE = 0.4
_SHORT_ANSWER = 16  # words; a shorter answer has no room for a loop
NEEDLE = "needle_"
"""Categories of long prompts begin with this; they are counted apart from the questions."""


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

    def row(self) -> dict[str, Any]:
        """The answer as `answers.jsonl` holds it."""
        return asdict(self)

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
        `needle_accuracy` and in `accuracy.CATEGORY` only.
        """
        asked = [a for a in self.answers if not a.category.startswith(NEEDLE)]
        needles = [a for a in self.answers if a.category.startswith(NEEDLE)]
        # One token does not tell a speed: it is all waiting for the prompt.
        rates = [a.rate for a in asked if a.completion_tokens > 1]
        first = [a.first_seconds for a in asked if a.first_seconds is not None]
        metrics = {
            "accuracy": _share([a.correct for a in asked]),
            "tokens_per_second": quantile(rates, 0.5),
            "tokens_per_second_p95": quantile(rates, 0.05),
            "latency_s": quantile([a.seconds for a in asked], 0.5),
            "latency_p95_s": quantile([a.seconds for a in asked], 0.95),
            "endless_rate": _share([a.finish_reason == "length" for a in asked]),
            "repetition_rate": _share([a.repeats for a in asked]),
            "load_time_s": self.load_seconds,
            "peak_memory_bytes": float(self.peak_memory_bytes),
        }
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


def repeats(text: str) -> bool:
    """Whether a text goes round in circles: most of it has been said before, word for word."""
    words = text.lower().split()
    if len(words) < _SHORT_ANSWER:
        return False
    runs = [tuple(words[i : i + _LOOP_WORDS]) for i in range(len(words) - _LOOP_WORDS + 1)]
    return 1 - len(set(runs)) / len(runs) >= _LOOP_SHARE


def ask(model_uri: str, questions: Sequence[Question], progress: Meter) -> Answers:
    """Ask a model every question, greedily.

    Args:
        model_uri: any URI that `mlflow.pyfunc.load_model` takes, of the chat or prompt contract.
        questions: what to ask.
        progress: counts the questions.

    Raises:
        UserError: the model refuses some of the questions; none was asked.
        EnvironmentProblem: the model cannot be loaded, or the process that held it died.
    """
    import multiprocessing
    from concurrent.futures.process import BrokenProcessPool

    context = multiprocessing.get_context("spawn")
    answers: list[Answer] = []
    there = multiprocessing.active_children()
    holding: list[BaseProcess] = []
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            loading = pool.submit(_load, model_uri)
            holding = [one for one in multiprocessing.active_children() if one not in there]
            load_seconds = loading.result()
            _refuse(model_uri, pool.submit(_refused, list(questions)).result())
            for start in range(0, len(questions), _BATCH):
                batch = list(questions[start : start + _BATCH])
                answers += pool.submit(_ask, batch).result()
                progress.advance(len(batch))
            peak = pool.submit(_peak).result()
    except BrokenProcessPool as error:
        raise EnvironmentProblem(_died(model_uri, holding)) from error
    checked = (
        judged(answer, question) for question, answer in zip(questions, answers, strict=True)
    )
    return Answers(tuple(checked), load_seconds, peak)


def _refuse(model_uri: str, refused: list[str]) -> None:
    """Refuse to ask what the model would not answer, before anything was asked.

    Raises:
        UserError: there is such a question.
    """
    if refused:
        more = len(refused) - _MOST_TOLD
        told = [*refused[:_MOST_TOLD], *([f"and {more} more"] if more > 0 else [])]
        raise UserError(
            problem_list(
                f"{model_uri} refuses {len(refused)} of the questions",
                told,
                "Shorten them or lower their max_tokens, or leave them out.",
            )
        )


def _died(model_uri: str, holding: Sequence[BaseProcess]) -> str:
    """What is told of the process that held a model and is gone."""
    code = code_of(holding)
    told = f"the process that held {model_uri} {ending(code)}, while it was being evaluated."
    if code == -signal.SIGKILL:
        told += " Close other programs, or take a smaller profile."
    return told


def judged(answer: Answer, question: Question) -> Answer:
    """The answer with what its question's check says of it."""
    why = why_wrong(question.check, answer.text)
    return replace(answer, correct=not why, why_wrong=why)


class _Asked:
    """The model in its process, whichever contract it answers."""

    def __init__(self, model_uri: str) -> None:
        import mlflow

        self.model = mlflow.pyfunc.load_model(model_uri)
        inputs = self.model.metadata.get_input_schema()
        self.prompts = inputs is not None and inputs.input_names() == ["prompt"]
        self._uri = model_uri
        self._tokenizer: Any = None

    def refused(self, question: Question) -> str | None:
        """Why the model would not answer a question; None when it would, or when it cannot say."""
        from mlflow.exceptions import MlflowException

        messages = [message.model_dump() for message in question.messages]
        limits = {"max_tokens": question.max_tokens, "temperature": 0.0}
        asked = {"prompt": self._text(messages)} if self.prompts else {"messages": messages}
        try:
            own = self.model.unwrap_python_model()
            for one in own._requests({**asked, **limits}, None):
                own.answerer.prepare(one)
        except MlflowException as error:
            if error.error_code == "INVALID_PARAMETER_VALUE":
                return f"question {question.id}: {error.message}"
        except (AttributeError, TypeError):  # a model of another kind
            return None
        return None

    def answer(self, question: Question) -> Answer:
        messages = [message.model_dump() for message in question.messages]
        start = time.monotonic()
        if self.prompts:
            text, usage, finish, first = self._prompt(messages, question.max_tokens, start)
        else:
            text, usage, finish, first = self._chat(messages, question.max_tokens, start)
        seconds = time.monotonic() - start
        return Answer(
            question_id=question.id,
            category=question.category,
            text=text,
            correct=False,  # checked outside: this process is only the model's
            seconds=seconds,
            first_seconds=first,
            prompt_tokens=int(usage["prompt_tokens"]),
            completion_tokens=int(usage["completion_tokens"]),
            finish_reason=finish,
            repeats=repeats(text),
        )

    def _chat(
        self, messages: list[dict[str, Any]], limit: int, start: float
    ) -> tuple[str, dict[str, int], str, float | None]:
        request = {"messages": messages, "max_tokens": limit, "temperature": 0.0}
        pieces: list[str] = []
        usage, finish, first = {"prompt_tokens": 0, "completion_tokens": 0}, "stop", None
        for chunk in self.model.predict_stream(request):
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                piece = choice["delta"].get("content")
                finish = choice.get("finish_reason") or finish
                if piece:
                    pieces.append(piece)
                    first = first or time.monotonic() - start
        return "".join(pieces), usage, finish, first

    def _prompt(
        self, messages: list[dict[str, Any]], limit: int, start: float
    ) -> tuple[str, dict[str, int], str, float | None]:
        """A text in and a text out: the chat template is applied here, the tokens counted here."""
        tokenizer, prompt = self._tokens(), self._text(messages)
        pieces, first = [], None
        params = {"max_tokens": limit, "temperature": 0.0}
        for piece in self.model.predict_stream({"prompt": prompt}, params):
            pieces.append(piece)
            first = first or time.monotonic() - start
        text = "".join(pieces)
        made = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        usage = {"prompt_tokens": len(tokenizer(prompt)["input_ids"]), "completion_tokens": made}
        return text, usage, "length" if made >= limit else "stop", first

    def _text(self, messages: list[dict[str, Any]]) -> str:
        """A conversation as the prompt that the chat template makes of it."""
        made = self._tokens().apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return str(made)

    def _tokens(self) -> Any:
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            folder = find_model(local_files(self._uri))
            self._tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        return self._tokenizer


_asked: _Asked | None = None


def _load(model_uri: str) -> float:
    global _asked
    connect()
    start = time.monotonic()
    try:
        _asked = _Asked(model_uri)
    except ProjectError:
        raise
    except Exception as error:  # of a class that may exist in this process only
        told = f"{model_uri} cannot be loaded: {type(error).__name__}: {error}"
        raise EnvironmentProblem(told) from None
    return time.monotonic() - start


def _refused(questions: list[Question]) -> list[str]:
    if _asked is None:
        raise RuntimeError("the model is not loaded")
    return [told for question in questions if (told := _asked.refused(question))]


def _ask(questions: list[Question]) -> list[Answer]:
    if _asked is None:
        raise RuntimeError("the model is not loaded")
    return [_answered(_asked, question) for question in questions]


def _answered(asked: _Asked, question: Question) -> Answer:
    """An answer, or an error that the parent process can read.

    The model brings classes of its own, also for errors, which exist in this process only.
    """
    from mlflow.exceptions import MlflowException

    try:
        return asked.answer(question)
    except Exception as error:
        if isinstance(error, MlflowException) and error.error_code == "INVALID_PARAMETER_VALUE":
            told = f"question {question.id}: the model refuses it: {error.message}"
            raise UserError(told) from None
        told = f"question {question.id}: {type(error).__name__}: {error}"
        raise RuntimeError(told) from None


def _peak() -> int:
    return peak_rss_bytes()


def read_answers(file: Path) -> list[Answer]:
    """What `row()` wrote, one JSON object per line."""
    # Not splitlines: it also splits at characters that an answer may hold, such as U+2028.
    return [Answer(**json.loads(line)) for line in file.read_text("utf-8").split("\n") if line]
