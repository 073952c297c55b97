"""Whether a full-precision model is held in memory to answer."""

from __future__ import annotations

BATCH_TOKENS = 4096
"""Of prompts and answers computed together where it is, padding included."""


def fits_well(size: int, free: int | None) -> bool:
    """Whether a model of so many bytes takes at most half of the free memory, if that is known.

    A greedy answer reads all of it for every token, so one that is swapped out never ends.
    """
    return free is None or size <= free / 2
