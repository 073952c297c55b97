"""What else a machine computes while a model's speed is measured, and what follows for the figures.

A speed that was measured beside other programs says as much about them as about the model.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

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


class LoadWatch:
    """Watches, from its making on, what share of the processor other programs use."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._busy, self._whole, self._own = _readings()

    def others(self) -> float | None:
        """The share of all cores' time that went to others than this process, 0 to 1.

        None where too little time has passed to tell, or the system does not say.
        """
        if time.monotonic() - self._began < _SHORTEST_S:
            return None
        busy, whole, own = _readings()
        passed = whole - self._whole
        if passed <= 0:
            return None
        return min(1.0, max(0.0, busy - self._busy - (own - self._own)) / passed)


def _readings() -> tuple[float, float, float]:
    """Seconds since the start: of all cores at work, of all cores at all, and of this process."""
    import psutil

    times = psutil.cpu_times()._asdict()
    # Linux counts what runs in virtual machines as user time already.
    whole = sum(value for kind, value in times.items() if not kind.startswith("guest"))
    own = os.times()
    return whole - times["idle"] - times.get("iowait", 0.0), whole, own.user + own.system


def measured_while(metrics: Mapping[str, float]) -> str:
    """How speeds were measured, in words; empty where it is not known."""
    load = metrics.get(OTHER_LOAD)
    if load is None:
        return ""
    return f"measured while other programs used {load:.0%} of the processor"


def unsound(metrics: Mapping[str, float]) -> str:
    """Why the speeds among some metrics say little about the model; empty where they are sound."""
    return measured_while(metrics) if metrics.get(OTHER_LOAD, 0.0) > LIMIT else ""
