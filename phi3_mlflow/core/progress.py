"""How far long work is: what work tells, without knowing who listens, and what a person sees of it.

A bar on a terminal, plain lines in a log, both on standard error.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from phi3_mlflow.core.console import is_quiet, say

if TYPE_CHECKING:
    from collections.abc import Iterator

_LINE_EVERY_SECONDS = 5.0
_POINTS = 200  # of the time so far, at which it is noted what had been done


class Meter(Protocol):
    """Counts what has been done; one unit is a byte of the input or of the output."""

    def advance(self, amount: int, work: float | None = None, left: float | None = None) -> None:
        """Add to what has been done; a negative amount takes back what has to be done again.

        Args:
            amount: in units of the total.
            work: what that took of all the work, where units differ in it; None: each the same.
            left: seconds that the rest will take, from who knows that better.
        """


class Progress(Protocol):
    """Opens a meter: `with progress("quantizing", total_bytes) as meter: meter.advance(n)`."""

    def __call__(
        self, description: str, total: int | None, unit: str = "bytes", /
    ) -> AbstractContextManager[Meter]:
        """Start a piece of work of `total` units, None where that is not known.

        Units as in `show_progress`.
        """


class _Silent:
    def advance(self, amount: int, work: float | None = None, left: float | None = None) -> None:
        del amount, work, left


@contextmanager
def no_progress(description: str, total: int | None, unit: str = "bytes", /) -> Iterator[Meter]:
    """The listener that says nothing."""
    del description, total, unit
    yield _Silent()


@contextmanager
def show_progress(
    description: str, total: int | None, unit: str = "bytes", work: float | None = None
) -> Iterator[Meter]:
    """Show how far a piece of work has come.

    Args:
        description: what is being done, a few words.
        total: how many units there are, or None when that is not known.
        unit: `bytes` are shown as MB with a rate; of a `share` only the percentage is shown, for
            work whose units say nothing to a person; anything else is counted.
        work: what all of it takes, where units differ in that; in any measure, the meter is told
            in the same. It decides the time that is left, and nothing else is seen of it.
    """
    if is_quiet():
        yield _Silent()
        return
    done = _Done(description, total, unit, total if work is None else work)
    if sys.stderr.isatty():
        with _bar(done) as bar:
            yield bar
    else:
        lines = _Lines(done)
        yield lines
        lines.done()


class _Done:
    """What has been done of a piece of work, and how long the rest will take.

    The rest is taken to go as quickly as what was done in the later half of the time so far. So
    neither a slow beginning counts for long, nor how busy the machine was an hour ago.

    Args:
        description, total, unit: as in `show_progress`.
        work: what all of it takes; None where that is not known.
    """

    def __init__(self, description: str, total: int | None, unit: str, work: float | None) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.count = 0
        self.start = self._last = time.monotonic()
        self._work, self._done = work, 0.0
        self._told: float | None = None
        # The work that was done by some times, the last of them before the half of the time first.
        self._known = deque([(self.start, 0.0)])

    def add(self, amount: int, work: float | None, left: float | None = None) -> float:
        """Note what has been done, and what is said of the rest; gives the time."""
        self.count += amount
        self._told = left
        self._done += amount if work is None else work
        now = self._last = time.monotonic()
        half = (self.start + now) / 2
        while len(self._known) > 1 and self._known[1][0] <= half:
            self._known.popleft()
        if now - self._known[-1][0] >= (now - self.start) / _POINTS:
            self._known.append((now, self._done))
        return now

    def left(self, now: float) -> float | None:
        """Seconds until all is done; None where that cannot be told, or nothing is left."""
        since = now - self._last
        if self._told is not None:
            return max(0.0, self._told - since) if self._told else None
        if not self._work or not 0 < self._done < self._work:
            return None
        then, before = self._known[0]
        took, made = self._last - then, self._done - before
        if made <= 0:  # some of it was taken back
            took, made = self._last - self.start, self._done
        return max(0.0, took / made * (self._work - self._done) - since)

    def amount(self) -> str:
        """How much has been done, of how much."""
        if self.unit == "share" and self.total:
            return ""
        if self.unit != "bytes":
            of = f" of {self.total}" if self.total else ""
            return f"{self.count}{of} {self.unit}"
        of = f" of {self.total / 1e6:.1f}" if self.total else ""
        return f"{self.count / 1e6:.1f}{of} MB"


@contextmanager
def _bar(done: _Done) -> Iterator[Meter]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        ProgressColumn,
        TaskProgressColumn,
        TextColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as RichProgress
    from rich.text import Text

    class _Left(ProgressColumn):
        def render(self, task: Any) -> Text:
            left = done.left(time.monotonic())
            return Text("" if left is None else _clock(left), style="progress.remaining")

    columns: tuple[ProgressColumn, ...] = (TextColumn("{task.fields[amount]}"),)
    if done.unit == "bytes":
        columns = (*columns, TransferSpeedColumn())
    elif done.unit == "share":
        columns = (TaskProgressColumn(),)
    with RichProgress(
        TextColumn("  {task.description}"),
        BarColumn(),
        *columns,
        _Left(),
        console=Console(stderr=True),
    ) as bar:
        task = bar.add_task(done.description, total=done.total, amount=done.amount())

        class _Bar:
            def advance(
                self, amount: int, work: float | None = None, left: float | None = None
            ) -> None:
                done.add(amount, work, left)
                bar.update(task, advance=amount, amount=done.amount())

        yield _Bar()


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def hide_bars_of_transformers() -> None:
    """Keep transformers from drawing bars of its own, which a log has no use for."""
    from transformers import utils

    library: Any = utils.logging
    library.disable_progress_bar()


class _Lines:
    """A line now and then, for logs: no carriage returns, no colours."""

    def __init__(self, done: _Done) -> None:
        self._done = done
        self._said: int | None = None
        self._last = done.start

    def advance(self, amount: int, work: float | None = None, left: float | None = None) -> None:
        now = self._done.add(amount, work, left)
        if now - self._last >= _LINE_EVERY_SECONDS:
            self._last = now
            self._print(now)

    def done(self) -> None:
        if self._said != self._done.count:
            self._print(time.monotonic())

    def _print(self, now: float) -> None:
        done, self._said = self._done, self._done.count
        amount = done.amount()
        share = f"{min(100, 100 * done.count // done.total)} %" if done.total else ""
        if amount:
            share = share and f" ({share})"
        left = done.left(now)
        told = "" if left is None else f", {left:.0f} s left"
        say(f"  {done.description}: {amount}{share}, {now - done.start:.0f} s{told}")
