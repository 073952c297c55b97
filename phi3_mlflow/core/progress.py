"""How long work tells its caller how far it is, without knowing who listens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Meter(Protocol):
    """Counts what has been done; one unit is a byte of the input or of the output."""

    def advance(self, amount: int) -> None:
        """Add to what has been done."""


class Progress(Protocol):
    """Opens a meter: `with progress("quantizing", total_bytes) as meter: meter.advance(n)`."""

    def __call__(self, description: str, total: int, /) -> AbstractContextManager[Meter]:
        """Start a piece of work of `total` bytes."""


class _Silent:
    def advance(self, amount: int) -> None:
        del amount


@contextmanager
def no_progress(description: str, total: int, /) -> Iterator[Meter]:
    """The listener that says nothing."""
    del description, total
    yield _Silent()
