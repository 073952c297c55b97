"""Which questions a model is asked one at a time, and how many of the others together.

Reading the weights is what a token of an answer costs, and one reading does for several answers. A
small model is asked one question at a time all the same: it takes minutes, and every answer then
tells a speed. A large one is asked a few that way, for speed and memory, and the others together.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from phi3_mlflow.core.machine import available_memory
from phi3_mlflow.evaluation.answers import NEEDLE, TASK
from phi3_mlflow.evaluation.model_files import ONNX_CONFIG, size_of
from phi3_mlflow.genai.kept import token_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from phi3_mlflow.evaluation.answers import Answer
    from phi3_mlflow.evaluation.items import Question

Batch = Literal["auto"] | int

TIMED = 8
"""Questions that are asked one at a time where the others are not."""

LARGE_BYTES = 1_000_000_000
"""Of a model's files: from here on `auto` asks questions together."""

TOGETHER = 8
"""How many, if memory allows."""

CACHE_BYTES = 2 << 30
"""What the keys and values of a batch may take at most."""

_GROWTH = 2  # while the memory of a batch grows, there is the old one besides
_WEIGHTS = 2  # times the size of the files: runtimes repack the weights
_TEMPLATE = 32  # tokens that a chat template adds, some eight more a message
_PER_MESSAGE = 8
_REMEMBERED = 32  # answers that a pace is taken from
_ANSWERED = 2  # a token of an answer takes some four times as long, and half of them are needed


@dataclass(frozen=True)
class Asking:
    """How a model is asked its questions.

    Attributes:
        batch: questions that are answered together at most; `auto` by the model's size.
        timed: questions that are asked one at a time in any case.
    """

    batch: Batch = "auto"
    timed: int = TIMED


@dataclass(frozen=True)
class Expected:
    """What a question takes, as far as it is known before it is asked.

    Attributes:
        prompt: tokens of it, roughly.
        answer: tokens that the answer may have.
    """

    prompt: int
    answer: int

    @property
    def tokens(self) -> int:
        """Places of keys and values that it takes at most."""
        return self.prompt + self.answer

    @property
    def work(self) -> int:
        """What it takes, in tokens of a prompt."""
        return self.prompt + _ANSWERED * self.answer


class Pace:
    """How long questions take that are asked one at a time, by those that were just answered.

    What a token of a prompt takes and what one of an answer takes, and how much of the answers'
    limits is used, come from the answers: a prompt of thousands of tokens is foreseen before the
    first of its kind.
    """

    def __init__(self) -> None:
        self._known: deque[tuple[Expected, Answer]] = deque(maxlen=_REMEMBERED)

    def note(self, takes: Expected, answer: Answer) -> None:
        """Learn from an answer."""
        self._known.append((takes, answer))

    def left(self, rest: Sequence[Expected]) -> float:
        """Seconds that some more questions will take; only after an answer was noted."""
        known = self._known
        prompts = sum(takes.prompt for takes, _ in known)
        limits = sum(takes.answer for takes, _ in known)
        # Of an answer that came in one piece it is not known when it began.
        first = sum(answer.first_seconds or 0.0 for _, answer in known)
        whole = sum(answer.seconds for _, answer in known)
        asked = sum(takes.prompt for takes in rest)
        allowed = sum(takes.answer for takes in rest)
        return asked * first / prompts + allowed * (whole - first) / limits

    def left_together(
        self,
        done: Sequence[Expected],
        begun: Sequence[Expected],
        rest: Sequence[Expected],
        seconds: float,
    ) -> float | None:
        """Seconds that questions will take that are answered together; None: none was alone.

        How much quicker they are together shows from what is done: some answers whole, and those
        that are begun by half, taken all in all.

        Args:
            done: what has been answered since they are asked together.
            begun: what is being answered.
            rest: what is not begun.
            seconds: since they are asked together.
        """
        if not self._known:
            return None
        running = self.left(begun)
        made = self.left(done) + running / 2
        return seconds / made * (self.left(rest) + running / 2)


def expected(folder: Path, questions: Sequence[Question]) -> list[Expected]:
    """What each question takes.

    Args:
        folder: with the `tokenizer.json` of the model.
        questions: what is asked.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    found = []
    for question in questions:
        texts = [message.content for message in question.messages]
        read = tokenizer.encode_batch(texts, add_special_tokens=False)
        prompt = sum(len(one.ids) + _PER_MESSAGE for one in read) + _TEMPLATE
        found.append(Expected(prompt, question.max_tokens))
    return found


def spread(items: Sequence[Question], count: int) -> Sequence[Question]:
    """So many of the items, at equal distances: the same of the same items every time."""
    return items[:: max(1, len(items) // count)][:count]


def asked_alone(questions: Sequence[Question], timed: int) -> frozenset[str]:
    """The ids of the questions that are asked one at a time whatever the others are.

    Long prompts are among them: a prompt is computed by itself anyhow. Rows of a task are not: no
    speed is told by them.
    """
    long = [one for one in questions if one.category.startswith(NEEDLE)]
    short = [one for one in questions if one not in long and one.category != TASK]
    return frozenset(one.id for one in (*spread(short, timed), *long))


def is_large(asking: Asking, size: float) -> bool:
    """Whether questions are worth asking together.

    Args:
        asking: how the profile wants it.
        size: of the model's files, in bytes.
    """
    return asking.batch > 1 if isinstance(asking.batch, int) else size >= LARGE_BYTES


def most_together(asking: Asking) -> int:
    """How many are asked together where memory allows."""
    return asking.batch if isinstance(asking.batch, int) else TOGETHER


def rows_that_fit(lengths: Sequence[int], most: int, one_token: int, room: int) -> int:
    """How many questions can be answered together, whichever they are; at least 1.

    Args:
        lengths: tokens of each, with its answer.
        most: how many at most.
        one_token: bytes of its keys and values.
        room: bytes that those of all may take.
    """
    rows, taken = 0, 0
    for length in sorted(lengths, reverse=True)[:most]:
        taken += _GROWTH * one_token * length
        if taken > room:
            break
        rows += 1
    return max(1, rows)


def room_for_batch(size: float, free: int | None) -> int:
    """Bytes for the keys and values of a batch: half of what the weights leave, within a bound.

    Args:
        size: of the model's files, in bytes.
        free: memory that is available; None where that is not known.
    """
    if free is None:
        return CACHE_BYTES
    return max(0, min(CACHE_BYTES, (free - int(_WEIGHTS * size)) // 2))


def room_for_answers(free: int | None) -> int:
    """Bytes for the keys and values of answers whose model is not in memory.

    Args:
        free: memory that is available; None where that is not known.
    """
    return CACHE_BYTES if free is None else max(0, min(CACHE_BYTES, free // 2))


def rows_together(asking: Asking, model: Path, lengths: Sequence[int]) -> int:
    """How many questions a model is asked together; 1: one after the other.

    Args:
        asking: how the profile wants it.
        model: the folder with its files.
        lengths: tokens of each question with its answer.
    """
    if not (model / ONNX_CONFIG).is_file():  # nothing else computes answers together
        return 1
    size = size_of(model)
    if not is_large(asking, size):
        return 1
    room = room_for_batch(size, available_memory())
    return rows_that_fit(lengths, most_together(asking), token_bytes(model), room)
