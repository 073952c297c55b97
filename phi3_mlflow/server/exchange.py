"""One request on its way through the server: place, worker thread, answer, statistics.

The model works in a thread and hands pieces to the event loop. A client that goes away, or time
that runs out, sets an event that the model looks at between two pieces of its work; the place is
given back when the thread has really ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phi3_mlflow.server.admission import Admission
from phi3_mlflow.server.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from starlette.requests import Request

    from phi3_mlflow.server.backend import BackendPart, BackendReply
    from phi3_mlflow.server.holder import Loaded
    from phi3_mlflow.server.metrics import Metrics


class ClientLeft(Exception):
    """The client went away; nobody reads an answer any more."""


class _End:
    pass


@dataclass
class RequestStats:
    """What is known of a request when it is over; times in seconds since it came."""

    version: str
    prompt_tokens: int = 0
    tokens: int = 0
    first_s: float | None = None
    last_s: float = 0.0
    total_s: float = 0.0
    outcome: str = "answered"

    @property
    def tokens_per_s(self) -> float | None:
        """From the first piece on; None when there were too few tokens to say."""
        if self.first_s is None or self.tokens < 2 or self.last_s <= self.first_s:
            return None
        return (self.tokens - 1) / (self.last_s - self.first_s)


class RequestQueue:
    """Where requests are taken: places and threads, shared by all endpoints of a server."""

    def __init__(self, running: int, waiting: int, limit_s: float, metrics: Metrics) -> None:
        self.admission = Admission(running, waiting)
        self.threads = ThreadPoolExecutor(running, thread_name_prefix="answer")
        self.limit_s = limit_s
        self.metrics = metrics
        self.open: set[Exchange] = set()

    def abandon_all(self) -> None:
        """Let the model stop whatever it is at."""
        for exchange in list(self.open):
            exchange.close()

    def close(self) -> None:
        """Take no more work, and wait for what is under way."""
        self.threads.shutdown(wait=True, cancel_futures=True)


class Exchange:
    """A request that is being answered by `loaded`.

    Args:
        done: called in the event loop with the statistics when all is over.

    Attributes:
        said: the texts of an answer so far.
    """

    def __init__(
        self,
        queue: RequestQueue,
        request: Request,
        loaded: Loaded,
        done: Callable[[RequestStats], None] = lambda stats: None,
    ) -> None:
        self.stats = RequestStats(loaded.version)
        self._queue = queue
        self._request = request
        self._loaded = loaded
        self._done = done
        self._finished = False
        self.said: list[str] = []
        self._began = time.perf_counter()
        self._left = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._results: asyncio.Queue[Any] = asyncio.Queue()
        self._watch = self._loop.create_task(self._watch_client())
        self._timer = self._loop.call_later(queue.limit_s, self._time_is_up)
        queue.open.add(self)

    async def begin(self, work: Callable[[Callable[[Any], None]], None]) -> None:
        """Wait for a place and set the model to work.

        Args:
            work: does it, in a thread; what it hands to its argument comes out of `results`.

        Raises:
            ApiError: the queue is full, or the wait took too long.
            ClientLeft: the client did not wait.
        """
        entering = self._loop.create_task(self._queue.admission.enter())
        interrupted = self._loop.create_task(self._results.get())
        try:
            await asyncio.wait((entering, interrupted), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            await self._abort(entering, interrupted)
            raise
        if interrupted.done() and not entering.done():
            await self._abort(entering, interrupted)
            raise interrupted.result()
        interrupted.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            self._results.put_nowait(await interrupted)  # came at the same moment
        if entering.exception() is not None:
            self._finish("rejected")
            entering.result()  # raises
        self._entered = time.perf_counter()
        self._loop.run_in_executor(self._queue.threads, self._run, work)

    async def results(self) -> AsyncIterator[Any]:
        """What the work hands over, until it is done.

        Raises:
            ApiError: time is up.
            ClientLeft: the client went away.
            Exception: what the work raised.
        """
        try:
            while True:
                result = await self._results.get()
                if isinstance(result, _End):
                    return
                if isinstance(result, Exception):
                    raise result
                yield result
        finally:
            self.close()

    def close(self) -> None:
        """Nobody wants more of it."""
        if not self._finished and not self._left.is_set():
            self.stats.outcome = "cancelled"
        self._left.set()

    async def _abort(self, entering: asyncio.Task[None], other: asyncio.Task[Any]) -> None:
        for task in (entering, other):
            task.cancel()
        await asyncio.gather(entering, other, return_exceptions=True)
        if not entering.cancelled() and entering.exception() is None:
            self._queue.admission.leave(0.0)
        self._finish(self.stats.outcome if self._left.is_set() else "cancelled")

    async def _watch_client(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self._interrupt("cancelled", ClientLeft())

    def _time_is_up(self) -> None:
        seconds = f"{self._queue.limit_s:g}"
        self._interrupt(
            "timed_out",
            ApiError(504, f"no whole answer within the limit of {seconds} s", "timeout"),
        )

    def _interrupt(self, outcome: str, error: Exception) -> None:
        if not self._left.is_set():
            self.stats.outcome = outcome
            self._left.set()
            self._results.put_nowait(error)

    def _run(self, work: Callable[[Callable[[Any], None]], None]) -> None:
        """In the worker thread."""
        error: Exception | None = None
        try:
            if not self._left.is_set():
                with self._loaded.backend.abandoned_by(self._left):
                    work(self._hand_over)
        except Exception as caught:
            # A model that was told to stop says so by an exception of its own.
            error = None if self._left.is_set() else caught
        self._tell(self._worker_ended, error)

    def _hand_over(self, result: Any) -> None:
        self._tell(self._results.put_nowait, result)

    def _tell(self, what: Callable[..., Any], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed by a second Ctrl-C
            self._loop.call_soon_threadsafe(what, *arguments)

    def _worker_ended(self, error: Exception | None) -> None:
        self._queue.admission.leave(time.perf_counter() - self._entered)
        outcome = self.stats.outcome
        if error is not None:
            outcome = "failed"
        self._results.put_nowait(error or _End())
        self._finish(outcome)

    def _finish(self, outcome: str) -> None:
        self._finished = True
        self._timer.cancel()
        self._watch.cancel()
        self._queue.open.discard(self)
        stats, metrics = self.stats, self._queue.metrics
        stats.outcome = outcome
        stats.total_s = time.perf_counter() - self._began
        if outcome == "cancelled":
            metrics.cancelled.inc()
        elif outcome == "timed_out":
            metrics.timed_out.inc()
        if stats.first_s is not None:
            metrics.first_token.observe(stats.first_s)
        if stats.tokens_per_s is not None:
            metrics.rate.observe(stats.tokens_per_s)
        metrics.tokens.labels("prompt", stats.version).inc(stats.prompt_tokens)
        metrics.tokens.labels("completion", stats.version).inc(stats.tokens)
        self._done(stats)

    def answer_with(self, *wanted: Any) -> Callable[[Callable[[Any], None]], None]:
        """Return the work of answering parsed requests: hands over replies, each with its parts."""

        def work(hand_over: Callable[[Any], None]) -> None:
            for one in wanted:
                self._answer(one, hand_over)

        return work

    def _answer(self, wanted: Any, hand_over: Callable[[Any], None]) -> None:
        reply: BackendReply = self._loaded.backend.begin(wanted)
        hand_over(reply)
        parts = reply.parts()
        try:
            for part in parts:
                self._count(part)
                self.said.append(part.text)
                hand_over(part)
        finally:
            close = getattr(parts, "close", None)
            if close is not None:
                close()
            self.stats.prompt_tokens += reply.prompt_tokens
            self.stats.tokens += reply.tokens

    def _count(self, part: BackendPart) -> None:
        now = time.perf_counter() - self._began
        if self.stats.first_s is None and part.tokens:
            self.stats.first_s = now
        self.stats.last_s = now
