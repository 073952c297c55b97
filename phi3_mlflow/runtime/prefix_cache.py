"""Keeping sessions, so that the next turn of a conversation need not compute it again."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from .engine import Engine, Session

# A kept state worth less than this many tokens is given up sooner than new memory is taken.
CHEAP = 128
# Sessions are made in steps of this many tokens, so that one fits more than one request.
STEP = 256


@dataclass
class _Kept:
    session: Session
    tokens: NDArray[np.int64]
    """The prompt it was computed for: what lies behind it (the answer) is never reused, because it
    was computed token by token, which rounds differently from computing it as a prompt."""


class PrefixCache:
    """A bounded number of sessions with the prompts they hold, the least recently used first.

    Args:
        budget: bytes of key-value cache that may be kept between requests. Requests under way are
            not held up by it.
        cut: where a prompt is cut into pieces (`engine.cuts`).
    """

    def __init__(
        self, engine: Engine, budget: int, cut: Callable[[Sequence[int]], list[int]]
    ) -> None:
        self._engine = engine
        self._budget = budget
        self._cut = cut
        self._kept: list[_Kept] = []
        self._guard = threading.Lock()

    def kept_bytes(self) -> int:
        """Bytes of key-value cache held by sessions that no request is using."""
        with self._guard:
            return self._size()

    def take(self, tokens: list[int], answer: int) -> tuple[Session, int]:
        """A session for a prompt and up to `answer` tokens more.

        Returns:
            The session, and how many tokens of the prompt it already holds. The caller has it
            alone until `give_back`; to drop it instead, it just lets it go.
        """
        needed = len(tokens) + answer
        wanted = np.asarray(tokens, dtype=np.int64)
        with self._guard:
            found = self._best(wanted, needed)
            if found is not None:
                kept, reused = found
                self._kept = [other for other in self._kept if other is not kept]
        if found is not None:
            kept.session.rewind(reused)
            return kept.session, reused
        # Room for a next turn as long as this one: a session cannot grow.
        roomy = -(-(needed + answer + STEP) // STEP) * STEP
        affordable = self._budget // max(self._engine.token_bytes, 1)
        capacity = max(needed, min(roomy, self._engine.context, affordable))
        self._make_room(capacity)
        return self._engine.open(capacity), 0

    def give_back(self, session: Session, tokens: list[int]) -> None:
        """Keep a session that has computed the whole prompt `tokens`, within the budget."""
        useful = bool(tokens) and session.reusable
        session.rest(len(tokens) if useful and self._budget else 0)
        if not useful or not self._budget or self._bytes(session) > self._budget:
            return
        with self._guard:
            self._kept.append(_Kept(session, np.asarray(tokens, dtype=np.int64)))
            self._shrink(self._budget)

    def _best(self, wanted: NDArray[np.int64], needed: int) -> tuple[_Kept, int] | None:
        """The kept session that holds most of the prompt; else one that is cheap to give up."""
        cuts = [0, *self._cut(wanted.tolist())]
        best: tuple[_Kept, int] | None = None
        for kept in self._kept:
            if kept.session.room < needed:
                continue
            # At least one token has to be computed, for the logits behind it.
            common = min(_common(kept.tokens, wanted), len(wanted) - 1)
            reused = max(cut for cut in cuts if cut <= common)
            if (reused or len(kept.tokens) < CHEAP) and (best is None or reused > best[1]):
                best = kept, reused
        return best

    def _make_room(self, capacity: int) -> None:
        with self._guard:
            self._shrink(max(self._budget - capacity * self._engine.token_bytes, 0))

    def _shrink(self, limit: int) -> None:
        while self._kept and self._size() > limit:
            self._kept.pop(0)

    def _size(self) -> int:
        return sum(self._bytes(kept.session) for kept in self._kept)

    def _bytes(self, session: Session) -> int:
        return session.capacity * self._engine.token_bytes


def _common(one: NDArray[np.int64], other: NDArray[np.int64]) -> int:
    """Number of equal tokens at the beginning of two sequences."""
    size = min(len(one), len(other))
    different = np.nonzero(one[:size] != other[:size])[0]
    return int(different[0]) if len(different) else size
