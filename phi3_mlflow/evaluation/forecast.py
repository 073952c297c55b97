"""How long it takes to answer questions in passes through a model, foreseen while it is being done.

A pass takes every text that is being answered a token further and costs a fixed time, for reading
the weights, and some for each token in it. How many passes there are depends on how long the
answers are, which is learned from those that are there: not only from finished ones, which would be
the short ones at first, but also from how far the others have come (a Kaplan-Meier estimate). The
passes that are left are then gone through in thought, with a length for every answer.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phi3_mlflow.evaluation.batching import Expected

_BINS = 24
_ENDING = 2.0  # answers that end while one gets as long as allowed, before any is known
_ASSUMED = 14.0  # so many answers that assumption counts as
_TRUST = 0.5  # and so many what answers do on the whole, for those of one length
_APART = 2.0  # while fewer are known, they are taken to be much alike
_REMEMBERED = 12  # passes that the pace is taken from
_TURN = 0.6180339887  # of the golden ratio: its multiples lie evenly, however many they are


@dataclass(frozen=True)
class Answering:
    """A question that is being answered.

    Attributes:
        unread: tokens of the prompt that no pass has read.
        made: tokens of the answer so far.
        takes: what was known of it beforehand.
    """

    unread: int
    made: int
    takes: Expected


@dataclass(frozen=True)
class Costs:
    """What passes take, before any was made.

    Attributes:
        fixed: seconds, of any pass.
        place: seconds, of each token in it.
        together: tokens in a pass that only reads prompts.
    """

    fixed: float
    place: float
    together: int


@dataclass(frozen=True)
class Left:
    """Seconds by the costs that were assumed: for reading prompts, and for saying answers."""

    reading: float
    saying: float


class Lengths:
    """How much of what they are allowed answers use, by those that are there.

    Attributes:
        known: answers that are finished.
    """

    def __init__(self) -> None:
        self.known = 0
        self._ended = [0.0] * _BINS
        self._finished = [0] * _BINS

    def note(self, made: int, most: int, *, ended: bool) -> None:
        """Learn from an answer that is finished: ended by itself, or as long as allowed."""
        place = _bin(made, most) if ended else _BINS - 1
        self.known += 1
        self._finished[place] += 1
        self._ended[place] += ended

    def hazards(self, running: Sequence[Answering]) -> list[float]:
        """How likely an answer that has come into a bin ends in it."""
        there = list(self._finished)
        for one in running:
            there[_bin(one.made, one.takes.answer)] += 1
        # Where nobody has come to yet, answers end as often as they do on the whole.
        gone = sum(count * (place + 0.5) for place, count in enumerate(there)) / _BINS
        often = (sum(self._ended) + _ASSUMED) / (gone + _ASSUMED / _ENDING)
        found, beyond = [0.0] * _BINS, 0.0
        for place in reversed(range(_BINS)):
            # Half of those that are in it now have not been through all of it.
            at_risk = beyond + (there[place] + self._finished[place]) / 2
            beyond += there[place]
            ended = self._ended[place] + _TRUST * min(1.0, often / _BINS)
            found[place] = min(1.0, ended / (at_risk + _TRUST))
        return found


def remaining(hazards: Sequence[float], made: int, most: int, chance: float) -> int:
    """Tokens that an answer still gets, at least 1: so many or fewer with a probability.

    Args:
        hazards: of `Lengths`.
        made: tokens that it has.
        most: tokens that it may have.
        chance: the probability.
    """
    lasts = 1.0
    for place in range(_bin(made, most), _BINS):
        lasts *= 1 - hazards[place]
        if lasts <= 1 - chance:
            end = (place + 0.5) * most / _BINS
            return max(1, min(most, round(end)) - made)
    return max(1, most - made)


class Forecast:
    """What is left of the work on some questions.

    Args:
        costs: of passes, as they are assumed at first.
        room: tokens of questions that are being answered together, as much as each may have.
        most: questions that are.
    """

    def __init__(self, costs: Costs, room: int, most: int) -> None:
        self.lengths = Lengths()
        self._costs, self._room, self._most = costs, room, most
        self._reading: deque[tuple[float, float]] = deque(maxlen=_REMEMBERED)
        self._saying: deque[tuple[float, float]] = deque(maxlen=_REMEMBERED)

    def note(self, places: int, seconds: float, *, reading: bool) -> None:
        """Learn from a pass.

        Args:
            places: tokens that were in it.
            seconds: that it took.
            reading: prompts were among them.
        """
        known = self._reading if reading else self._saying
        known.append((self._pass(places), seconds))

    def left(self, running: Sequence[Answering], waiting: Sequence[Expected]) -> Left:
        """What is left, as far as it was assumed; `seconds` says it by the pace of now.

        Args:
            running: questions that are being answered.
            waiting: those that are not yet, in their order.
        """
        costs, hazards = self._costs, self.lengths.hazards(running)
        apart = self.lengths.known / (self.lengths.known + _APART)

        def chance(number: int) -> float:
            return 0.5 + apart * (number * _TURN % 1 - 0.5)

        queue, ends, number = deque(waiting), list[tuple[int, int]](), 0
        taken = sum(one.takes.tokens for one in running)
        prompts = sum(one.unread for one in running)
        for one in running:
            number += 1
            turns = remaining(hazards, one.made, one.takes.answer, chance(number))
            ends.append((turns, one.takes.tokens))
        heapq.heapify(ends)
        now, saying = 0, 0.0
        while ends or queue:
            while queue and len(ends) < self._most:
                if ends and taken + queue[0].tokens > self._room:
                    break
                takes = queue.popleft()
                number += 1
                taken, prompts = taken + takes.tokens, prompts + takes.prompt
                turns = remaining(hazards, 0, takes.answer, chance(number))
                heapq.heappush(ends, (now + turns, takes.tokens))
            end, tokens = ends[0]
            saying += (end - now) * self._pass(len(ends))
            heapq.heappop(ends)
            now, taken = end, taken - tokens
        return Left(prompts * (costs.place + costs.fixed / costs.together), saying)

    def seconds(
        self, left: Left, places: int = 0, done: float = 0.0, since: float = 0.0, *,
        reading: bool = False,
    ) -> float:  # fmt: skip
        """Seconds that are left, by the pace of the passes that were made last.

        Args:
            left: what there is after the pass that is being made.
            places: tokens in that one; 0: none is being made.
            done: share of it that is done.
            since: seconds since it began.
            reading: prompts are among its tokens.
        """
        now = self._pass(places) if places else 0.0
        begun = [(now * done, since)] if places and done else []
        read = _pace([*self._reading, *(begun if reading else ())])
        say = _pace([*self._saying, *(() if reading else begun)]) or 1.0
        rest = since / done * (1 - done) if begun else now * ((read or 1.0) if reading else say)
        return rest + left.reading * (read or 1.0) + left.saying * say

    def _pass(self, places: int) -> float:
        return self._costs.fixed + places * self._costs.place


def _pace(known: Sequence[tuple[float, float]]) -> float | None:
    """How many times as long passes took as was assumed; None where none is known."""
    assumed = sum(one for one, _ in known)
    return sum(seconds for _, seconds in known) / assumed if assumed else None


def _bin(made: int, most: int) -> int:
    return min(_BINS - 1, made * _BINS // most)
