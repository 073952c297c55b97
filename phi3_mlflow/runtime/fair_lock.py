"""Taking turns at the processor.

The engines hold Python's interpreter lock, or all cores, while they compute. Requests that run at
the same time therefore take turns, one piece of work (a token, or a chunk of a prompt) each, in
the order in which they ask: a short request gets every second turn while one long request runs, and
waits at most one piece of work for it, however long the long one is.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType


class FairLock:
    """A lock that is handed to the thread that has waited longest.

    `threading.Lock` gives no such promise: the thread that lets it go nearly always gets it back.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()
        self._taken = False

    def __enter__(self) -> None:
        with self._guard:
            if not self._taken:
                self._taken = True
                return
            gate = threading.Lock()
            gate.acquire()
            self._waiting.append(gate)
        try:
            gate.acquire()  # opened by the thread whose turn ends
        except BaseException:  # an interrupted wait must not swallow the turn
            with self._guard:
                if gate in self._waiting:
                    self._waiting.remove(gate)
                    raise
            self._next()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._next()

    def _next(self) -> None:
        with self._guard:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._taken = False
