"""Answers of a full-precision checkpoint that is not loaded as a whole.

All questions are answered together, as many at once as their keys and values have room for; each
pass reads the weights once (see `layers.generate`). What was answered is written down at once, by
the content of the checkpoint, the questions and the code: a run that is killed goes on with the
questions that are left, and nothing is asked twice.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phi3_mlflow.artifacts.cache import key_of
from phi3_mlflow.artifacts.code_keys import closure, library_versions
from phi3_mlflow.artifacts.manifests import MANIFEST_NAME, sha256_of_file
from phi3_mlflow.artifacts.unfinished import drop_kept_folder, kept_folder
from phi3_mlflow.checkpoints.reader import CheckpointReader
from phi3_mlflow.core import console
from phi3_mlflow.core.machine import available_memory
from phi3_mlflow.evaluation.answers import Answer, read_answers
from phi3_mlflow.evaluation.batching import Expected, room_for_answers
from phi3_mlflow.evaluation.datasets import digest
from phi3_mlflow.evaluation.forecast import Answering, Costs, Forecast
from phi3_mlflow.evaluation.prompted import Prompter
from phi3_mlflow.evaluation.streamed import weights_of
from phi3_mlflow.layers.decoder import Decoder
from phi3_mlflow.layers.generate import Generation, Part, Prompt, pass_seconds, token_bytes
from phi3_mlflow.layers.room import MOST_TEXTS, PASS_PLACES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from phi3_mlflow.artifacts.cache import StepCache
    from phi3_mlflow.core.progress import Meter
    from phi3_mlflow.evaluation.items import Question

STEP = "answers"
"""Under which name the answers lie in the step cache."""

_FILE = "answers.jsonl"
_TRIED = 16  # texts in the pass that is tried beforehand


def answer_streamed(
    checkpoint: Path, questions: Sequence[Question], progress: Meter, store: StepCache | None = None
) -> tuple[Answer, ...]:
    """Ask a checkpoint, greedily, with a few megabytes of its weights in memory.

    Args:
        checkpoint: the folder, with its tokenizer and chat template.
        questions: what to ask.
        progress: counts the questions, and is told the seconds that are left.
        store: where answers are kept; None keeps nothing.

    Returns:
        One answer per question, in the same order; their times are shares of the passes that they
        had a part in, and say nothing about a single request.
    """
    if store is None:
        return _in_order(questions, _ask(checkpoint, questions, progress))
    parts = _parts(checkpoint, questions, store)
    key = key_of(parts)
    with store.locked(STEP, key):
        entry = store.find(STEP, key)
        if entry is not None:
            progress.advance(len(questions))
            return _in_order(questions, read_answers(entry.path / _FILE))
        with (
            kept_folder(store, STEP, key) as unfinished,
            store.building(STEP, key, {"parts": parts, "time": time.time()}) as out,
        ):
            known = _kept(unfinished / _FILE)
            progress.advance(len(known))
            asked = {_name(answer) for answer in known}
            left = [q for q in questions if (q.category, q.id) not in asked]
            with (unfinished / _FILE).open("a", encoding="utf-8") as stream:
                for answer in _ask(checkpoint, left, progress):
                    known.append(answer)
                    stream.write(_line(answer))
                    stream.flush()
            found = _in_order(questions, known)
            (out / _FILE).write_text("".join(map(_line, found)), "utf-8")
        drop_kept_folder(store, STEP, key)
        return found


def _ask(checkpoint: Path, questions: Sequence[Question], progress: Meter) -> Iterator[Answer]:
    """The answers, as they become known."""
    if not questions:
        return
    prompter = Prompter(checkpoint)
    ids = [prompter.ids(prompter.prompt(question)) for question in questions]
    takes = [Expected(len(one), q.max_tokens) for one, q in zip(ids, questions, strict=True)]
    # The longest first: so none of them is left over at the end, with nobody beside it.
    order = sorted(range(len(questions)), key=lambda index: -takes[index].tokens)
    decoder = Decoder(checkpoint, CheckpointReader(checkpoint))
    room = room_for_answers(available_memory())
    generation = Generation(
        decoder,
        [Prompt(ids[index], questions[index].max_tokens) for index in order],
        prompter.ends,
        room,
    )
    watch = _Watch(
        [takes[index] for index in order],
        Forecast(_tried(decoder), room // token_bytes(decoder), MOST_TEXTS),
        progress,
    )
    spent = [0.0] * len(order)
    while parts := generation.take_up():
        start = time.monotonic()
        ended = generation.run(parts, watch.passing(generation, parts))
        seconds = time.monotonic() - start
        watch.passed(seconds)
        for part in parts:
            spent[part.text.number] += seconds / len(parts)
        for text in ended:
            watch.finished(text.number, len(text.made), ended=text.ended)
            index = order[text.number]
            yield prompter.answer(
                questions[index],
                text.made,
                ended=text.ended,
                prompt_tokens=takes[index].prompt,
                seconds=spent[text.number],
            )


@dataclass
class _Watch:
    """Follows the passes, and tells a meter of them.

    Attributes:
        takes: what each question takes, by its number.
        forecast: learns from the passes.
        progress: is told.
    """

    takes: Sequence[Expected]
    forecast: Forecast
    progress: Meter
    _pass: tuple[int, bool] = (0, False)
    _left: float = 0.0
    _finished: int = 0

    def passing(self, generation: Generation, parts: Sequence[Part]) -> Callable[[float], None]:
        """What is to be told which share of a pass is done, before that pass."""
        places = sum(part.count for part in parts)
        reading = any(part.start < len(part.text.prompt.tokens) for part in parts)
        self._pass, start = (places, reading), time.monotonic()
        running = [
            Answering(text.unread, len(text.made), self.takes[text.number])
            for text in generation.running
        ]
        waiting = [self.takes[number] for number, _ in generation.waiting]
        left = self.forecast.left(running, waiting)

        def told(share: float) -> None:
            since = time.monotonic() - start
            seconds = self.forecast.seconds(left, places, share, since, reading=reading)
            self._left = max(seconds, 1e-3)
            self.progress.advance(0, 0.0, self._left)

        return told

    def passed(self, seconds: float) -> None:
        """A pass took so long."""
        places, reading = self._pass
        self.forecast.note(places, seconds, reading=reading)

    def finished(self, number: int, made: int, *, ended: bool) -> None:
        """A question is answered."""
        self.forecast.lengths.note(made, self.takes[number].answer, ended=ended)
        self._finished += 1
        self.progress.advance(1, 0.0, self._left if self._finished < len(self.takes) else 0.0)


def _tried(decoder: Decoder) -> Costs:
    """What passes take, by a layer's products with one text and with some."""
    pass_seconds(decoder, 1)  # the first time pays for pages and threads
    one, some = pass_seconds(decoder, 1), pass_seconds(decoder, _TRIED)
    place = max((some - one) / (_TRIED - 1), 1e-9)
    return Costs(max(one - place, 0.0), place, PASS_PLACES)


def _kept(file: Path) -> list[Answer]:
    """The answers that a run has left which was killed; a line that is not whole is removed."""
    if not file.is_file():
        return []
    lines = file.read_text("utf-8", errors="replace").split("\n")[:-1]
    found = []
    for line in lines:
        try:
            found.append(Answer(**json.loads(line)))
        except (ValueError, TypeError):
            break
    file.write_text("".join(map(_line, found)), "utf-8")
    if found:
        console.say(f"  full precision: {len(found)} questions were answered before")
    return found


def _line(answer: Answer) -> str:
    return json.dumps(answer.row(), ensure_ascii=False) + "\n"


def _in_order(
    questions: Sequence[Question], answers: Iterator[Answer] | Sequence[Answer]
) -> tuple[Answer, ...]:
    found = {_name(answer): answer for answer in answers}
    return tuple(found[question.category, question.id] for question in questions)


def _name(answer: Answer) -> tuple[str, str]:
    return answer.category, answer.question_id


def _parts(checkpoint: Path, questions: Sequence[Question], store: StepCache) -> dict[str, Any]:
    """Everything that decides the answers."""
    asking = closure((__name__,))
    about = [*checkpoint.glob("*.json"), *checkpoint.glob("*.jinja")]
    return {
        "checkpoint": weights_of(checkpoint, store),
        "about": {
            file.name: sha256_of_file(file) for file in sorted(about) if file.name != MANIFEST_NAME
        },
        "questions": digest(questions),
        "code": asking.hashes(),
        "libraries": library_versions([asking]),
    }
