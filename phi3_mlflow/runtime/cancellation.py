"""Telling a model that nobody waits for its answer any more.

The thread that asks a model names an event; whatever works in that thread looks at the event
between two pieces of its work.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_here = threading.local()


class Abandoned(Exception):
    """Nobody waits for the answer any more; what was computed for it stays good."""


@contextmanager
def abandoned_by(event: threading.Event) -> Iterator[None]:
    """End whatever this thread asks a model for with `Abandoned`, soon after `event` is set."""
    before = getattr(_here, "event", None)
    _here.event = event
    try:
        yield
    finally:
        _here.event = before


def watched() -> threading.Event:
    """Return the event of `abandoned_by` in this thread, or one that is never set."""
    event = getattr(_here, "event", None)
    return event if event is not None else threading.Event()
