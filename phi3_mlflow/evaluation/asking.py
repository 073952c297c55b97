"""Ask a logged model the questions of a set, in a process of its own, and measure what it costs.

The process holds nothing but the model, so its peak memory is what serving it takes. Answers are
streamed where the model can, for the time to the first piece. Where questions are asked together,
that is another process, after the first has ended: memory and times are those of the first.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from phi3_mlflow.core import console
from phi3_mlflow.core.endings import code_of, ending
from phi3_mlflow.core.errors import EnvironmentProblem, ProjectError, UserError, problem_list
from phi3_mlflow.core.meter import peak_rss_bytes
from phi3_mlflow.core.progress import show_progress
from phi3_mlflow.evaluation.again import time_again
from phi3_mlflow.evaluation.answers import Answer, Answers, judged, repeats
from phi3_mlflow.evaluation.batching import Asking, Pace, asked_alone, expected, rows_together
from phi3_mlflow.evaluation.load import LoadWatch
from phi3_mlflow.evaluation.model_files import find_model
from phi3_mlflow.tracking.connection import connect
from phi3_mlflow.tracking.stored_files import local_files

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from multiprocessing.process import BaseProcess
    from pathlib import Path

    from phi3_mlflow.core.progress import Meter
    from phi3_mlflow.evaluation.batching import Expected
    from phi3_mlflow.evaluation.items import Question

_MOST_TOLD = 20
_KEPT_MB = 1  # for next turns: there are none, and memory is what limits a batch


def ask(
    model_uri: str,
    model: Path,
    questions: Sequence[Question],
    tokenizer: Path,
    asking: Asking,
    *,
    uncounted: int = 0,
) -> Answers:
    """Ask a model every question, greedily, together where `asking` says so.

    Args:
        model_uri: any URI that `mlflow.pyfunc.load_model` takes, of the chat or prompt contract.
        model: the folder of its files that a runtime opens.
        questions: what to ask.
        tokenizer: a folder with the model's `tokenizer.json`, to foresee what a question takes.
        asking: one at a time or together.
        uncounted: so many at the beginning are asked alone and not counted in what is shown.

    Raises:
        UserError: the model refuses some of the questions; none was asked.
        EnvironmentProblem: the model cannot be loaded, or the process that held it died.
    """
    asked = _Questions(questions, expected(tokenizer, questions), uncounted)
    numbers = range(len(questions))
    chosen = asked_alone(questions[uncounted:], asking.timed)
    alone = [i for i in numbers if i < uncounted or questions[i].id in chosen]
    # The longest first: so none of them is left over at the end, with nobody beside it.
    others = sorted(set(numbers) - set(alone), key=lambda number: -asked.takes[number].work)
    rows = rows_together(asking, model, [asked.takes[number].tokens for number in others])
    if rows > 1 and not _takes_batches(model_uri):
        rows = 1
    pace = Pace()
    if rows == 1:
        found, load_seconds, peak = _one_by_one(model_uri, asked, numbers, "questions", pace)
    else:
        console.say(
            f"  {len(alone) - uncounted} questions are asked one at a time, for speed and memory, "
            f"{len(others)} up to {rows} together"
        )
        name = "questions, one at a time"
        found, load_seconds, peak = _one_by_one(model_uri, asked, alone, name, pace)
        found |= _several(model_uri, asked, others, rows, pace)
    checked = (judged(found[number], questions[number]) for number in numbers)
    return Answers(tuple(checked), load_seconds, peak)


@dataclass(frozen=True)
class _Questions:
    """What is asked, by number.

    Attributes:
        takes: what each takes, as far as it is known beforehand.
        uncounted: so many at the beginning are not counted in what is shown.
    """

    questions: Sequence[Question]
    takes: Sequence[Expected]
    uncounted: int

    @contextmanager
    def shown(self, name: str, numbers: Sequence[int]) -> Iterator[Meter]:
        """Progress of some of them."""
        count = sum(number >= self.uncounted for number in numbers)
        work = sum(self.takes[number].work for number in numbers)
        with show_progress(name, count, "answered", work) as bar:
            yield bar


def _one_by_one(
    model_uri: str, asked: _Questions, numbers: Sequence[int], name: str, pace: Pace
) -> tuple[dict[int, Answer], float, int]:
    """Answers by number, the seconds until the model was loaded, and the peak memory in bytes."""
    found: dict[int, Answer] = {}
    with asked.shown(name, numbers) as bar, _process(model_uri) as process:
        load_seconds = process.submit(_load, model_uri).result()
        _refuse(model_uri, process.submit(_refused, list(asked.questions)).result())
        for place, number in enumerate(numbers, start=1):
            found[number] = process.submit(_ask, asked.questions[number]).result()
            pace.note(asked.takes[number], found[number])
            left = pace.left([asked.takes[later] for later in numbers[place:]])
            bar.advance(int(number >= asked.uncounted), asked.takes[number].work, left)
        counted = {n: found[n] for n in numbers if n >= asked.uncounted}
        found |= time_again(
            counted, lambda number: process.submit(_ask, asked.questions[number]).result()
        )
        return found, load_seconds, process.submit(_peak).result()


def _several(
    model_uri: str, asked: _Questions, numbers: Sequence[int], rows: int, pace: Pace
) -> dict[int, Answer]:
    """Answers by number, up to `rows` of them computed together, which `pace` knows alone."""
    found: dict[int, Answer] = {}
    config = {"batch": rows, "prefix_cache_mb": _KEPT_MB}
    name = f"questions, up to {rows} together"
    with asked.shown(name, numbers) as bar, _process(model_uri) as process:
        process.submit(_load, model_uri, config).result()
        start = time.monotonic()
        process.submit(_begin, [asked.questions[number] for number in numbers]).result()
        for _ in numbers:
            place, answer = process.submit(_next).result()
            found[numbers[place]] = answer
            done = [asked.takes[one] for one in found]
            still = [asked.takes[one] for one in numbers if one not in found]
            seconds = time.monotonic() - start
            left = pace.left_together(done, still[:rows], still[rows:], seconds)
            bar.advance(1, asked.takes[numbers[place]].work, left)
    return found


@contextmanager
def _process(model_uri: str) -> Iterator[ProcessPoolExecutor]:
    """A process for the model.

    Raises:
        EnvironmentProblem: it died.
    """
    context = multiprocessing.get_context("spawn")
    there = multiprocessing.active_children()
    holding: list[BaseProcess] = []
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            pool.submit(_peak)  # anything: with the first call the process begins
            holding = [one for one in multiprocessing.active_children() if one not in there]
            yield pool
    except BrokenProcessPool as error:
        raise EnvironmentProblem(_died(model_uri, holding)) from error


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


class _Asked:
    """The model in its process, whichever contract it answers.

    Attributes:
        together: questions that it answers at once.
    """

    def __init__(self, model_uri: str, config: dict[str, Any]) -> None:
        import mlflow

        self.model = mlflow.pyfunc.load_model(model_uri, model_config=config or None)
        inputs = self.model.metadata.get_input_schema()
        self.prompts = inputs is not None and inputs.input_names() == ["prompt"]
        self.together = _together(self.model) if config else 1
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
            alone=self.together == 1,
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
        tokenizer, prompt = self.tokens(), self._text(messages)
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
        made = self.tokens().apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return str(made)

    def tokens(self) -> Any:
        """The tokenizer for the prompt contract."""
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            folder = find_model(local_files(self._uri))
            self._tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        return self._tokenizer


def _takes_batches(model_uri: str) -> bool:
    """Whether a model was logged with the setting: MLflow warns of values that are new to it."""
    import mlflow

    about = mlflow.models.get_model_info(model_uri).flavors.get("python_function", {})
    return "batch" in (about.get("config") or {})


def _together(model: Any) -> int:
    """How many requests a loaded model computes at once."""
    try:
        return int(model.unwrap_python_model().live().together)
    except Exception:  # not a model of this project, or one from before there were batches
        return 1


_asked: _Asked | None = None
_threads: ThreadPoolExecutor | None = None
_coming: Iterator[Future[tuple[int, Answer]]] = iter(())


def _load(model_uri: str, config: dict[str, Any] | None = None) -> float:
    global _asked
    connect()
    start = time.monotonic()
    try:
        _asked = _Asked(model_uri, config or {})
    except ProjectError:
        raise
    except Exception as error:  # of a class that may exist in this process only
        told = f"{model_uri} cannot be loaded: {type(error).__name__}: {error}"
        raise EnvironmentProblem(told) from None
    return time.monotonic() - start


def _model() -> _Asked:
    if _asked is None:
        raise RuntimeError("the model is not loaded")
    return _asked


def _refused(questions: list[Question]) -> list[str]:
    return [told for question in questions if (told := _model().refused(question))]


def _ask(question: Question) -> Answer:
    watch = LoadWatch()
    answer = _answered(_model(), question)
    return replace(answer, others=watch.others())


def _begin(questions: list[Question]) -> None:
    """Begin to answer questions together; `_next` gives the answers."""
    global _threads, _coming
    model = _model()
    if model.prompts:
        model.tokens()  # loaded once, before several threads want it
    _threads = ThreadPoolExecutor(model.together)

    def answer(number: int) -> tuple[int, Answer]:
        return number, _answered(model, questions[number])

    _coming = as_completed([_threads.submit(answer, number) for number in range(len(questions))])


def _next() -> tuple[int, Answer]:
    """The number of a question and its answer, whichever is ready; an error begins no other."""
    try:
        return next(_coming).result()
    except BaseException:
        if _threads is not None:
            _threads.shutdown(wait=False, cancel_futures=True)
        raise


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
