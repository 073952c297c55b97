"""The scheduler of the batch: which sequences are computed in the next step, and in which slots.

There is no thread behind it: of the threads that wait for their tokens, one computes for all.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from .batch_graph import BatchGraph
    from .fair_lock import FairLock

# A sequence that was computed in the last step is waited for so long before the next one begins:
# its thread is choosing the token.
_PATIENCE_S = 0.004


class BatchSession:
    """A sequence that has a slot while it is worked on, and a copy of its own while it rests."""

    shared = True
    reusable = True

    def __init__(self, scheduler: BatchScheduler, room: int) -> None:
        self.room = room
        self.length = 0
        self.slot: int | None = None
        self.saved: list[NDArray[Any]] = []
        self._scheduler = scheduler
        self._logits: NDArray[np.float32] = np.empty(0, dtype=np.float32)

    @property
    def capacity(self) -> int:
        """Tokens it has memory for now."""
        return self.length

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens and compute, together with what others ask for."""
        self._logits = self._scheduler.compute(self, tokens)

    def logits(self) -> NDArray[np.float32]:
        """Return the logits of the token that follows, shape (V,), float32."""
        return self._logits

    def follow(self, token: int | None) -> int:
        """Append `token`, if there is one, and choose the likeliest one after it."""
        if token is not None:
            self.extend([token])
        return int(self._logits.argmax())

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self.length = length

    def rest(self, length: int) -> None:
        """Leave the slot; of what was computed the first `length` tokens are kept."""
        self._scheduler.rest(self, length)


@dataclass(eq=False)
class _Job:
    session: BatchSession
    tokens: NDArray[np.int64]
    logits: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, dtype=np.float32))
    error: BaseException | None = None
    done: bool = False


class BatchScheduler:
    """Computes what several threads ask for at the same time.

    A piece of a prompt is computed by itself, a token of an answer together with those of all
    other answers; the two kinds alternate, so that a long prompt does not hold answers up.

    Args:
        graph: computes, and holds the slots.
        lock: shared with whoever else computes on this machine's cores.
    """

    def __init__(self, graph: BatchGraph, lock: FairLock) -> None:
        self._graph = graph
        self._lock = lock
        self._changed = threading.Condition()
        self._jobs: list[_Job] = []
        self._slots: list[BatchSession | None] = [None] * graph.slots
        self._expected: set[BatchSession] = set()
        self._someone_computes = False
        self._last_was_prompt = False

    def compute(self, session: BatchSession, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Append tokens to a session.

        Returns:
            Logits of the token that follows, shape (V,), float32.
        """
        job = _Job(session, np.asarray(tokens, dtype=np.int64))
        with self._changed:
            self._jobs.append(job)
            self._expected.discard(session)
            self._changed.notify_all()
        try:
            while self._must_compute(job):
                try:
                    self._compute_some()
                finally:
                    with self._changed:
                        self._someone_computes = False
                        self._changed.notify_all()
        except BaseException:
            with self._changed:  # nobody waits for it any more
                self._jobs = [other for other in self._jobs if other is not job]
            raise
        if job.error is not None:
            raise job.error
        return job.logits

    def _must_compute(self, job: _Job) -> bool:
        """Wait until the job is done, or nobody computes; then it is for this thread to do so."""
        with self._changed:
            self._changed.wait_for(lambda: job.done or not self._someone_computes)
            if not job.done:
                self._someone_computes = True
            return not job.done

    def rest(self, session: BatchSession, length: int) -> None:
        """Take a session out of its slot, with a copy of its first `length` tokens."""
        with self._changed:
            self._expected.discard(session)
            slot = session.slot
            if slot is not None:
                session.saved = self._graph.save(slot, length) if length else []
                session.slot = self._slots[slot] = None
                self._graph.forget(slot)
            elif not length:
                session.saved = []
            session.length = length
            self._changed.notify_all()

    def _compute_some(self) -> None:
        """One piece of a prompt, or one token of every answer that waits for one."""
        with self._changed:
            self._changed.wait_for(lambda: not self._expected, _PATIENCE_S)
            self._expected.clear()  # who is slower than that is not waited for again
        with self._lock:
            with self._changed:
                jobs = self._next()
            if jobs:
                self._run(jobs)
                return
        with self._changed:  # every slot belongs to somebody who is choosing a token
            self._changed.wait(_PATIENCE_S)

    def _run(self, jobs: list[_Job]) -> None:
        try:
            with self._changed:
                first, tokens, lengths = self._plan(jobs)
                slots = [_slot(job.session) - first for job in jobs]
            logits = self._graph.run(first, tokens, lengths)
            for job, slot in zip(jobs, slots, strict=True):
                # A copy: the whole array would be kept alive by one row of it.
                job.logits = logits[slot, len(job.tokens) - 1].copy()
                job.session.length += len(job.tokens)
        except BaseException as error:
            for job in jobs:
                job.error = error
        with self._changed:
            for job in jobs:
                job.done = True
            if len(jobs[0].tokens) == 1:
                self._expected.update(job.session for job in jobs if job.error is None)

    def _next(self) -> list[_Job]:
        """What is computed now, taken from what waits; its sessions have slots."""
        ready = [job for job in self._jobs if self._seated(job.session)]
        prompts = [job for job in ready if len(job.tokens) > 1]
        answers = [job for job in ready if len(job.tokens) == 1]
        self._last_was_prompt = bool(prompts) and not (answers and self._last_was_prompt)
        chosen = prompts[:1] if self._last_was_prompt else answers
        self._jobs = [job for job in self._jobs if job not in chosen]
        return chosen

    def _seated(self, session: BatchSession) -> bool:
        if session.slot is not None:
            return True
        slot = next((slot for slot, there in enumerate(self._slots) if there is None), None)
        if slot is None:
            return False
        self._reserve(session.length)
        if session.length:
            self._graph.load(slot, session.saved, session.length)
        session.saved = []
        session.slot, self._slots[slot] = slot, session
        return True

    def _reserve(self, tokens: int) -> None:
        seated = {slot: there.length for slot, there in enumerate(self._slots) if there is not None}
        # One more for a spare token, and one that the other slots write behind theirs.
        self._graph.reserve(max(tokens, *seated.values(), 0) + 2, seated)

    def _plan(self, jobs: list[_Job]) -> tuple[int, NDArray[np.int64], list[int]]:
        """First slot, tokens and lengths of a call."""
        longest = max(job.session.length + len(job.tokens) for job in jobs)
        self._reserve(longest)
        if len(jobs[0].tokens) > 1:
            (job,) = jobs
            new = job.tokens if len(job.tokens) % 2 == 0 else np.append(job.tokens, 0)
            return _slot(job.session), new[None], [job.session.length + len(new)]
        self._close_ranks()
        count = max(slot for slot, there in enumerate(self._slots) if there is not None) + 1
        count += count % 2
        # A slot that is not asked for gets a token behind its last one, which the next overwrites.
        tokens = np.zeros((count, 1), dtype=np.int64)
        lengths = [1 if there is None else there.length + 1 for there in self._slots[:count]]
        for job in jobs:
            tokens[_slot(job.session)] = job.tokens
        return 0, tokens, lengths

    def _close_ranks(self) -> None:
        """Move the last slots into free ones before them; free ones in between are computed too."""
        while True:
            taken = [slot for slot, there in enumerate(self._slots) if there is not None]
            free = [slot for slot in range(len(taken)) if self._slots[slot] is None]
            if not free:
                return
            slot, to = taken[-1], free[0]
            session = self._slots[slot]
            assert session is not None
            self._graph.move(slot, to, session.length)
            self._graph.forget(slot)
            session.slot = to
            self._slots[slot], self._slots[to] = None, session


def _slot(session: BatchSession) -> int:
    if session.slot is None:
        raise RuntimeError("a sequence without a slot was to be computed")
    return session.slot
