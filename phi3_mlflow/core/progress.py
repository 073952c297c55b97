"""How far long work is: what work tells, without knowing who listens, and what a person sees of it.

A bar on a terminal, plain lines in a log, both on standard error.
"""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from phi3_mlflow.core.console import is_quiet, say

if TYPE_CHECKING:
    from collections.abc import Iterator

_LINE_EVERY_SECONDS = 5.0


class Meter(Protocol):
    """Counts what has been done; one unit is a byte of the input or of the output."""

    def advance(self, amount: int) -> None:
        """Add to what has been done; a negative amount takes back what has to be done again."""


class Progress(Protocol):
    """Opens a meter: `with progress("quantizing", total_bytes) as meter: meter.advance(n)`."""

    def __call__(
        self, description: str, total: int | None, unit: str = "bytes", /
    ) -> AbstractContextManager[Meter]:
        """Start a piece of work of `total` units, None where that is not known.

        Units as in `show_progress`.
        """


class _Silent:
    def advance(self, amount: int) -> None:
        del amount


@contextmanager
def no_progress(description: str, total: int | None, unit: str = "bytes", /) -> Iterator[Meter]:
    """The listener that says nothing."""
    del description, total, unit
    yield _Silent()


@contextmanager
def show_progress(description: str, total: int | None, unit: str = "bytes") -> Iterator[Meter]:
    """Show how far a piece of work has come.

    Args:
        description: what is being done, a few words.
        total: how many units there are, or None when that is not known.
        unit: `bytes` are shown as MB with a rate; of a `share` only the percentage is shown, for
            work whose units say nothing to a person; anything else is counted.
    """
    if is_quiet():
        yield _Silent()
    elif sys.stderr.isatty():
        with _bar(description, total, unit) as bar:
            yield bar
    else:
        lines = _Lines(description, total, unit)
        yield lines
        lines.done()


@contextmanager
def _bar(description: str, total: int | None, unit: str) -> Iterator[Meter]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        ProgressColumn,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as RichProgress

    amount: tuple[ProgressColumn, ...] = (MofNCompleteColumn(),)
    if unit == "bytes":
        amount = (DownloadColumn(), TransferSpeedColumn())
    elif unit == "share":
        amount = (TaskProgressColumn(),)
    with RichProgress(
        TextColumn("  {task.description}"),
        BarColumn(),
        *amount,
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as bar:
        task = bar.add_task(description, total=total)

        class _Bar:
            def advance(self, amount: int) -> None:
                bar.advance(task, amount)

        yield _Bar()


def hide_bars_of_transformers() -> None:
    """Keep transformers from drawing bars of its own, which a log has no use for."""
    from transformers import utils

    library: Any = utils.logging
    library.disable_progress_bar()


class _Lines:
    """A line now and then, for logs: no carriage returns, no colours."""

    def __init__(self, description: str, total: int | None, unit: str) -> None:
        self._description, self._total, self._unit = description, total, unit
        self._count = 0
        self._said: int | None = None
        self._start = self._last = time.monotonic()

    def advance(self, amount: int) -> None:
        self._count += amount
        now = time.monotonic()
        if now - self._last >= _LINE_EVERY_SECONDS:
            self._last = now
            self._print(now)

    def done(self) -> None:
        if self._said != self._count:
            self._print(time.monotonic())

    def _print(self, now: float) -> None:
        self._said = self._count
        elapsed = now - self._start
        amount = self._amount()
        share = f"{min(100, 100 * self._count // self._total)} %" if self._total else ""
        if amount:
            share = share and f" ({share})"
        left = ""
        if self._total and 0 < self._count < self._total:
            left = f", {elapsed / self._count * (self._total - self._count):.0f} s left"
        say(f"  {self._description}: {amount}{share}, {elapsed:.0f} s{left}")

    def _amount(self) -> str:
        if self._unit == "share" and self._total:
            return ""
        if self._unit != "bytes":
            of = f" of {self._total}" if self._total else ""
            return f"{self._count}{of} {self._unit}"
        of = f" of {self._total / 1e6:.1f}" if self._total else ""
        return f"{self._count / 1e6:.1f}{of} MB"
