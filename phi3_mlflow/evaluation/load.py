"""What else a machine computes while a model's speed is measured, and what follows for the figures.

A speed that was measured beside other programs says as much about them as about the model.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from phi3_mlflow.core.machine import affinity, group_seconds, usable_cores

if TYPE_CHECKING:
    from collections.abc import Mapping

OTHER_LOAD = "other_load"
"""The metric: the share of the processor that other programs used while speeds were measured."""

LIMIT = 0.1
"""Above this share a speed is not sound. An idle system's own chores take less than half of it."""

SPEEDS = (
    "tokens_per_second",
    "tokens_per_second_p95",
    "tokens_per_second_spread",
    "time_to_first_token_s",
    "time_to_first_token_p95_s",
    "latency_s",
    "latency_p95_s",
    "load_time_s",
)
"""The metrics that other programs make worse."""

_SHORTEST_S = 0.2  # the system counts in hundredths of a second: less than this tells nothing


@dataclass(frozen=True)
class Readings:
    """Seconds that the system has counted so far.

    Attributes:
        busy: of the cores that this process may run on, at work.
        whole: of the same cores, at work or not.
        own: of this process, on all of them.
        group: of everything in the control group whose quota this process shares; None without a
            quota.
    """

    busy: float
    whole: float
    own: float
    group: float | None = None


class LoadWatch:
    """Watches, from its making on, what share of the processor other programs use."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._before = _readings()

    def others(self) -> float | None:
        """The share of the cores' time that went to others than this process, 0 to 1.

        None where too little time has passed to tell, or the system does not say.
        """
        seconds = time.monotonic() - self._began
        if seconds < _SHORTEST_S:
            return None
        return share_of_others(self._before, _readings(), seconds, usable_cores())


def share_of_others(before: Readings, after: Readings, seconds: float, cores: int) -> float | None:
    """What others took of the cores that this process may use, 0 to 1.

    A container that may use a few cores of many is not disturbed by what its neighbours compute on
    the rest: of theirs counts what the rest has no room for. What shares its quota counts in full.

    Args:
        before: what the system had counted.
        after: what it has counted now.
        seconds: between the two.
        cores: how many this process may use.

    Returns:
        None where the system does not count.
    """
    there = (after.whole - before.whole) / seconds
    if there <= 0:
        return None
    own = after.own - before.own
    elsewhere = max(0.0, there - cores)
    taken = (after.busy - before.busy - own) / seconds - elsewhere
    if before.group is not None and after.group is not None:
        taken = max(taken, (after.group - before.group - own) / seconds)
    return min(1.0, max(0.0, taken / min(there, cores)))


def _readings() -> Readings:
    import psutil

    times = psutil.cpu_times(percpu=True)
    mine = affinity()
    if mine and max(mine) < len(times):  # otherwise what is shown is not what is numbered
        times = [times[core] for core in mine]
    busy = whole = 0.0
    for core in times:
        spent = core._asdict()
        # Linux counts what runs in virtual machines as user time already.
        passed = sum(value for kind, value in spent.items() if not kind.startswith("guest"))
        whole += passed
        busy += passed - spent["idle"] - spent.get("iowait", 0.0)
    own = os.times()
    return Readings(busy, whole, own.user + own.system, group_seconds())


def measured_while(metrics: Mapping[str, float]) -> str:
    """How speeds were measured, in words; empty where it is not known."""
    load = metrics.get(OTHER_LOAD)
    if load is None:
        return ""
    return f"measured while other programs used {load:.0%} of the processor"


def unsound(metrics: Mapping[str, float]) -> str:
    """Why the speeds among some metrics say little about the model; empty where they are sound."""
    return measured_while(metrics) if metrics.get(OTHER_LOAD, 0.0) > LIMIT else ""
