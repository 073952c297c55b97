"""Who may be answered now, who waits, and who is sent away."""

from __future__ import annotations

import asyncio
import math
from collections import deque

from phi3_mlflow.server.errors import ApiError

_LONGEST_RETRY_S = 120


class Admission:
    """A number of places and a queue before them, first come, first served.

    To be used from one event loop.

    Args:
        running: places.
        waiting: how many may wait for one.
    """

    def __init__(self, running: int, waiting: int) -> None:
        self._places = running
        self._most = waiting
        self._queue: deque[asyncio.Future[None]] = deque()
        self._mean_s = 2.0  # of how long a place is held; the beginning is a guess
        self.running = 0

    @property
    def waiting(self) -> int:
        """Requests that wait for a place."""
        return len(self._queue)

    async def enter(self) -> None:
        """Take a place, after a wait if need be; `leave` gives it back.

        Raises:
            ApiError: the queue is full (429, with Retry-After).
        """
        if self.running < self._places:
            self.running += 1
            return
        if len(self._queue) >= self._most:
            seconds = self.retry_after()
            raise ApiError(
                429,
                f"{self.running} requests are being answered and {self.waiting} wait; "
                f"try again in {seconds} s",
                "queue_full",
                headers={"Retry-After": str(seconds)},
            )
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append(mine)
        try:
            await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled():
                self._pass_on()  # the place came at the very moment of leaving
            else:
                self._queue.remove(mine)
            raise

    def leave(self, held_s: float) -> None:
        """Give the place back after `held_s` seconds."""
        self._mean_s += 0.2 * (held_s - self._mean_s)
        self._pass_on()

    def retry_after(self) -> int:
        """Seconds until a place in the queue is likely to be free."""
        expected = self._mean_s * max(len(self._queue), 1) / self._places
        return min(max(math.ceil(expected / 2), 1), _LONGEST_RETRY_S)

    def _pass_on(self) -> None:
        while self._queue:
            following = self._queue.popleft()
            if not following.done():
                following.set_result(None)  # the place changes hands, `running` stays
                return
        self.running -= 1
