"""What fine-tuning will need: memory by its own estimate, disk, and roughly what time.

Rows that lie on this machine are counted for it. Where they are elsewhere, what is said of memory
is the least that it can be, and of time nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from phi3_mlflow.core.errors import UserError
from phi3_mlflow.core.machine import whole_memory
from phi3_mlflow.evaluation.answers import TOKENS_TO_SPARE
from phi3_mlflow.evaluation.batching import Expected
from phi3_mlflow.layers.room import IN_MEMORY, PASS_TOKENS
from phi3_mlflow.rows.location import is_uri, local_path
from phi3_mlflow.stages.foreseen import Foreseen
from phi3_mlflow.training.data import load_training
from phi3_mlflow.training.lora import room_for
from phi3_mlflow.training.memory import engine_for, streamed_memory, training_memory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phi3_mlflow.core.rates import Rates
    from phi3_mlflow.stages.foreseen import Model
    from phi3_mlflow.training.conversations import Conversation
    from phi3_mlflow.training.data import TrainingData
    from phi3_mlflow.training.settings import TrainSettings

_LETTERS_PER_TOKEN = 4
_TEMPLATE = 16  # tokens that a chat template adds to a row, at least
_DEVICES = Path("/dev")


@dataclass(frozen=True)
class Rows:
    """What is trained on, roughly.

    Attributes:
        count: rows to train on.
        tokens: of all of them.
        longest: tokens of the longest.
        validation: tokens of all rows to validate with.
    """

    count: int
    tokens: int
    longest: int
    validation: int


def training(settings: TrainSettings, model: Model, rates: Rates) -> Foreseen:
    """What fine-tuning a model needs.

    Args:
        settings: the profile's section `train`.
        model: its sizes.
        rates: of this machine.

    Raises:
        UserError: target modules that the model does not have.
    """
    rows = rows_here(settings)
    longest = rows.longest if rows else 1
    if settings.packing and rows:
        longest = min(settings.max_length, rows.tokens)
    engine = engine_for(model.reader, settings, lambda: longest, whole_memory(), has_gpu)
    streamed = engine == "streamed"
    estimate = streamed_memory if streamed else training_memory
    # Of a GPU's memory nothing is known here.
    on_gpu = not streamed and has_gpu()
    memory = 0 if on_gpu else estimate(model.reader, settings, longest).total
    disk = room_for(model.reader, settings)
    if streamed:
        between = 4 * max(longest, PASS_TOKENS) * model.layers * model.hidden
        disk += between if between > IN_MEMORY else 0
    seconds = None
    if rows is not None and not on_gpu:
        seconds = _seconds(settings, model, rates, rows, streamed=streamed)
    return Foreseen(memory=memory, disk=disk, seconds=seconds)


def rows_here(settings: TrainSettings) -> Rows | None:
    """The rows, as far as they lie on this machine and can be read; the step says what is wrong."""
    found = _loaded_here(settings)
    if found is None:
        return None
    # Longer ones are left out.
    lengths = [n for n in _lengths(found.train) if n <= settings.max_length]
    aside = [n for n in _lengths(found.validation) if n <= settings.max_length]
    return Rows(len(lengths), sum(lengths), max(lengths, default=0), sum(aside))


def task_here(settings: TrainSettings, most: int) -> list[Expected]:
    """What the questions of the task take, that the rows set aside become, if they are known.

    Args:
        settings: the profile's section `train`.
        most: rows that are asked at most.
    """
    found = _loaded_here(settings)
    takes = []
    for row in found.validation[:most] if found else ():
        answer = len(row.messages[-1].content) // _LETTERS_PER_TOKEN
        (whole,) = _lengths([row])
        takes.append(Expected(whole - answer, answer + TOKENS_TO_SPARE))
    return takes


def _loaded_here(settings: TrainSettings) -> TrainingData | None:
    data, given = _here(settings.data), settings.validation
    validation = _here(given) if given else None
    if data is None or (given and validation is None):
        return None
    try:
        return load_training(
            data,
            format=settings.format,
            validation=validation,
            validation_share=settings.validation_share,
        )
    except (UserError, OSError):
        return None


def has_gpu() -> bool:
    """Whether there is a GPU that torch might use, without loading torch."""
    return any(_DEVICES.glob("nvidia[0-9]*"))


def _here(place: Path | str) -> Path | None:
    remote = is_uri(str(place)) and not str(place).startswith("file:")
    return None if remote else local_path(place)


def _lengths(rows: Sequence[Conversation]) -> list[int]:
    letters = (sum(len(message.content) for message in row.messages) for row in rows)
    return [count // _LETTERS_PER_TOKEN + _TEMPLATE for count in letters]


def _seconds(
    settings: TrainSettings, model: Model, rates: Rates, rows: Rows, *, streamed: bool
) -> float:
    """Forward and backward through all weights, none of which has a gradient of its own."""
    batch = settings.per_device_train_batch_size * settings.num_processes
    batches = settings.num_train_epochs * math.ceil(rows.count / batch)
    steps = math.ceil(batches / settings.gradient_accumulation_steps)
    again = streamed or settings.gradient_checkpointing
    ways = 3 if again else 2
    tokens = ways * settings.num_train_epochs * rows.tokens
    if settings.rehearsal:  # once without the adapter, then with it forward and backward
        tokens += 3 * batches * settings.rehearsal_tokens
    validated = (steps // settings.save_steps + 1) * rows.validation
    seconds = (tokens + validated) * model.products / rates.products
    if streamed and steps:  # the weights are read twice per pass, and a step is one at least
        of_a_step = settings.num_train_epochs * rows.tokens / steps
        passes = steps * math.ceil(of_a_step / PASS_TOKENS)
        seconds += 2 * passes * model.nbytes / rates.memory
    return seconds + 2 * model.nbytes / rates.disk
