"""What rendering a chat template may use: time of its thread, and the sizes of what it makes."""

from __future__ import annotations

import threading
import time
from typing import Any

from jinja2.utils import Namespace

DEEPEST = 50
"""Lists within lists."""
ITEM = 16
"""What an item of a list counts, in characters."""
_TURN = 500
_BETWEEN_CHECKS = 100_000
"""Characters, or turns times `_TURN`, between two looks at the clock."""


class TooMuch(Exception):
    """A template took more time or memory than it may."""


class Budget:
    """What one rendering may still use.

    Args:
        seconds: of this thread's own processor time.
        largest: characters of one text.
        work: characters of all texts that come into being; an item of a list counts as some.
    """

    def __init__(self, seconds: float, largest: int, work: int) -> None:
        self._until = time.thread_time() + seconds
        self._largest = largest
        self._work = work
        self._unchecked = 0
        # Nothing in the sandbox can change a list: what was weighed once stays as it is. Held, so
        # that nothing else gets its id.
        self._known: dict[tuple[int, bool], tuple[Any, int]] = {}

    def step(self, size: int = 1) -> None:
        """Count something that came into being, or one turn of a loop.

        Raises:
            TooMuch: no more is allowed.
        """
        self._work -= size
        if size > self._largest or self._work < 0:
            raise TooMuch("it makes too much text")
        self._unchecked += size + _TURN
        if self._unchecked > _BETWEEN_CHECKS:
            self._unchecked = 0
            if time.thread_time() > self._until:
                raise TooMuch("it takes too long")

    def weigh(self, value: Any, *, shown: bool = False, depth: int = 0) -> int:
        """Count a value with all that is in it, as often as it is in it.

        Args:
            value: anything.
            shown: it is to be written out, or compared.
            depth: of lists around it.

        Raises:
            TooMuch: it is too large, or too deep.
        """
        if isinstance(value, str):
            size = len(value)
        elif isinstance(value, dict | list | tuple | set | frozenset):
            if found := self._known.get((id(value), shown)):
                size = found[1]
            else:
                size = self._weigh_items(value, shown, depth)
                self._known[id(value), shown] = (value, size)
        elif shown and isinstance(value, Namespace):
            raise TooMuch("it writes a namespace out")
        else:
            size = 0
        if size > self._largest:
            raise TooMuch("it makes too much text")
        self.step()
        return size + ITEM

    def _weigh_items(self, value: Any, shown: bool, depth: int) -> int:
        if depth > DEEPEST:
            raise TooMuch(f"it nests lists more than {DEEPEST} deep")
        size = 0
        for item in value:
            size += self.weigh(item, shown=shown, depth=depth + 1)
            if isinstance(value, dict):
                size += self.weigh(value[item], shown=shown, depth=depth + 1)
            if size > self._largest:
                break
        return size


_now = threading.local()


class budgeted:
    """Everything in this thread counts against a budget meanwhile."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget

    def __enter__(self) -> None:
        self._before = getattr(_now, "budget", None)
        _now.budget = self._budget

    def __exit__(self, *_: object) -> None:
        _now.budget = self._before


def current_budget() -> Budget:
    """The budget of what is being rendered in this thread."""
    budget: Budget = _now.budget
    return budget
