"""Taking the times of answers again where other programs computed while they were given."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from phi3_mlflow.core import console
from phi3_mlflow.evaluation.answers import FEWEST_TIMED, NEEDLE, TASK, Answer, other_load

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

ROUNDS = 2
"""How often it is tried: a machine that stays busy is told of, not waited for."""


def time_again(found: Mapping[int, Answer], ask: Callable[[int], Answer]) -> dict[int, Answer]:
    """Ask disturbed questions again, until enough tell the model's speed, or it was tried enough.

    Args:
        found: answers by number, as they were given one at a time.
        ask: asks the question of a number.

    Returns:
        Those that were quieter the second time, with the times of then.
    """
    told = dict(found)
    timed = [number for number in found if not found[number].category.startswith((NEEDLE, TASK))]
    quieter: dict[int, Answer] = {}
    for _ in range(ROUNDS):
        disturbed = [number for number in timed if told[number].disturbed]
        missing = min(FEWEST_TIMED, len(timed)) - (len(timed) - len(disturbed))
        if missing <= 0:
            break
        load = other_load([told[number] for number in disturbed]) or 0.0
        console.say(
            f"  other programs used {load:.0%} of the processor: the times of {missing} questions "
            "are taken again"
        )
        for number in disturbed[:: max(1, len(disturbed) // missing)][:missing]:
            before, again = told[number], ask(number)
            if (again.others or 0.0) < (before.others or 0.0):
                told[number] = quieter[number] = replace(
                    before,
                    seconds=again.seconds,
                    first_seconds=again.first_seconds,
                    others=again.others,
                )
    return quieter
