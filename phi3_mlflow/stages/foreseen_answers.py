"""What asking full precision will need: the base and the fine-tuned checkpoint, or the reference.

Beside a fine-tuned version its base is asked the general questions and those of the task, and the
checkpoint that the version was made from those of the task. In size full that checkpoint is asked
the general questions, too. Whether it is loaded as a whole for that, or goes through layer by
layer, depends on the memory that is free, here as in the step itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from phi3_mlflow.evaluation.batching import Expected, room_for_answers
from phi3_mlflow.evaluation.divergence import batches
from phi3_mlflow.evaluation.forecast import Costs, Forecast
from phi3_mlflow.evaluation.room import BATCH_TOKENS, fits_well
from phi3_mlflow.layers.room import MOST_TEXTS, PASS_PLACES, generation_memory
from phi3_mlflow.quantization.preflight import LIBRARIES
from phi3_mlflow.stages.foreseen import Foreseen

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phi3_mlflow.config.profile import Profile
    from phi3_mlflow.core.rates import Rates
    from phi3_mlflow.stages.foreseen import Model

_HALVES = 8  # answers that are taken to be known, each half as long as allowed
_READ = 2  # times the weights are moved in a pass: read, and turned into float32


def full_precision(
    profile: Profile,
    model: Model,
    general: Sequence[Expected],
    task: Sequence[Expected],
    texts: int,
    rates: Rates,
    free: int | None,
) -> Foreseen:
    """What the answers and losses of full-precision checkpoints need.

    Args:
        profile: that is run.
        model: its sizes.
        general: what the general questions take.
        task: what the rows take that training set aside.
        texts: tokens of the held-out texts.
        rates: of this machine.
        free: memory that is available; None where that is not known.
    """
    fits = fits_well(4 * model.weights, free)
    wanted = profile.evaluation.reference_answers
    asked: list[Sequence[Expected]] = []
    seconds = 0.0
    if profile.evaluation.size == "full" and (wanted == "always" or (wanted == "auto" and fits)):
        asked.append(general)
    if profile.train is not None:
        asked += [[*general, *task], task]
        scored = texts + 2 * sum(takes.tokens for takes in task)
        seconds += scored * model.products / rates.products
    asked = [some for some in asked if some]
    if not asked:
        return Foreseen(seconds=seconds)
    room = room_for_answers(free)
    if fits:
        memory = 4 * model.weights + BATCH_TOKENS * model.cached
        seconds += sum(_in_memory(model, some, rates) for some in asked)
    else:
        longest = max(takes.tokens for some in asked for takes in some)
        all_of_them = max(sum(takes.tokens for takes in some) for some in asked)
        kept = max(longest * model.cached, min(room, all_of_them * model.cached))
        widest = 2 * model.mlp // (3 * model.hidden)
        memory = kept + generation_memory(model.hidden, widest)
        seconds += sum(layer_by_layer(model, some, rates, free) for some in asked)
    return Foreseen(memory=LIBRARIES + memory, seconds=seconds)


def layer_by_layer(
    model: Model, asked: Sequence[Expected], rates: Rates, free: int | None
) -> float:
    """Seconds for answers in passes through the layers.

    Args:
        model: its sizes.
        asked: what the questions take.
        rates: of this machine.
        free: memory that is available; None where that is not known.
    """
    reading, room = _READ * model.nbytes / rates.memory, room_for_answers(free)
    if free is not None and model.nbytes > free - room:
        # The system's cache of files cannot hold them: every pass reads them from the disk.
        reading += model.nbytes / rates.disk
    costs = Costs(
        fixed=reading,
        place=model.products / rates.products,
        together=PASS_PLACES,
    )
    forecast = Forecast(costs, room // model.cached, MOST_TEXTS)
    for _ in range(_HALVES):
        forecast.lengths.note(1, 2, ended=True)
    return forecast.seconds(forecast.left((), sorted(asked, key=lambda takes: -takes.tokens)))


def _in_memory(model: Model, asked: Sequence[Expected], rates: Rates) -> float:
    """Seconds for answers through transformers: a batch goes on as long as its longest answer."""
    loading = 2 * model.nbytes / rates.memory
    seconds, place = 2 * loading, model.products / rates.products
    for group in batches([takes.tokens for takes in asked], BATCH_TOKENS):
        some = [asked[index] for index in group]
        step = 4 * model.weights / rates.memory + len(some) * place
        seconds += len(some) * max(takes.prompt for takes in some) * place
        seconds += max(takes.answer for takes in some) * step
    return seconds
