"""The time that is left is foreseen, whatever the answers turn out to be like."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3_mlflow.evaluation.batching import Expected
from phi3_mlflow.evaluation.forecast import (
    Answering,
    Costs,
    Forecast,
    Lengths,
    remaining,
)

PASS, MOST = 512, 256


@dataclass
class _Asked:
    takes: Expected
    length: int  # of the answer, as it turns out
    unread: int
    made: int = 0


class Machine:
    """Answers questions in simulated time, as `layers.generate` schedules them."""

    def __init__(self, asked: list[_Asked], room: int, fixed: float, read: float, say: float):
        self.waiting, self.running, self.room = list(asked), list[_Asked](), room
        self.fixed, self.read, self.say = fixed, read, say

    def take_up(self) -> list[tuple[_Asked, int]]:
        while self.waiting and len(self.running) < MOST:
            taken = sum(one.takes.tokens for one in self.running) + self.waiting[0].takes.tokens
            if self.running and taken > self.room:
                break
            self.running.append(self.waiting.pop(0))
        parts, left = [(one, 1) for one in self.running if not one.unread], PASS
        for one in self.running:
            if count := min(one.unread, left):
                parts.append((one, count))
                left -= count
        return parts

    def seconds(self, parts: list[tuple[_Asked, int]]) -> float:
        costs = (self.read if one.unread else self.say for one, _ in parts)
        counts = (count for _, count in parts)
        return self.fixed + sum(cost * count for cost, count in zip(costs, counts, strict=True))

    def passed(self, parts: list[tuple[_Asked, int]]) -> list[_Asked]:
        for one, count in parts:
            one.unread = max(0, one.unread - count)
            one.made += not one.unread
        ended = [one for one in self.running if one.made >= one.length]
        self.running = [one for one in self.running if one.made < one.length]
        return ended


@dataclass
class _Told:
    now: float
    found: float  # what was foreseen
    seconds: float  # of the pass
    ended: int  # answers


def told(machine: Machine, costs: Costs) -> list[_Told]:
    """What was foreseen, at several moments of each pass."""
    forecast, now, ended = Forecast(costs, machine.room, MOST), 0.0, 0
    said: list[_Told] = []
    while parts := machine.take_up():
        reading = any(one.unread for one, _ in parts)
        places = sum(count for _, count in parts)
        running = [
            Answering(max(0, one.unread - dict_of(parts).get(id(one), 0)), one.made, one.takes)
            for one in machine.running
        ]
        left = forecast.left(running, [one.takes for one in machine.waiting])
        seconds = machine.seconds(parts)
        for share in (0.1, 0.5, 1.0):
            found = forecast.seconds(left, places, share, share * seconds, reading=reading)
            said.append(_Told(now + share * seconds, found, seconds, ended))
        now += seconds
        for one in machine.passed(parts):
            ended += 1
            forecast.lengths.note(one.made, one.takes.answer, ended=one.made < one.takes.answer)
        forecast.note(places, seconds, reading=reading)
    return said


def dict_of(parts: list[tuple[_Asked, int]]) -> dict[int, int]:
    return {id(one): count for one, count in parts if one.unread}


LENGTHS: dict[str, Callable[[random.Random, int], int]] = {
    "as long as allowed": lambda chance, most: most,
    "half of it": lambda chance, most: most // 2,
    "a quarter": lambda chance, most: most // 4,
    "any": lambda chance, most: chance.randint(1, most),
    "short or endless": lambda chance, most: chance.choice([most // 5, most]),
    "mostly short": lambda chance, most: min(most, 1 + int(chance.expovariate(6 / most))),
}


@pytest.mark.parametrize("size", ["phi-3-mini", "phi-3-medium", "faster"])
@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize("questions", ["general", "task"])
def test_after_a_minute_it_is_never_out_by_more_than_twice(
    questions: str, kind: str, size: str
) -> None:
    chance = random.Random(f"{questions} {kind} {size}")
    fixed, place, room = {
        "phi-3-mini": (2.0, 0.075, 2730),
        "phi-3-medium": (7.5, 0.28, 5240),
        "faster": (0.5, 0.01, 2730),
    }[size]
    asked = []
    for _ in range(200 if questions == "task" else 45):
        prompt, most = chance.randint(60, 300), chance.randint(36, 96)
        if questions == "general":
            prompt, most = chance.randint(20, 80), chance.choice([32, 64, 128])
        asked.append(_Asked(Expected(prompt, most), max(1, LENGTHS[kind](chance, most)), prompt))
    asked.sort(key=lambda one: -one.takes.tokens)
    # What is tried beforehand is out by some, and single tokens cost more than those of prompts.
    said = told(Machine(asked, room, fixed, place, 1.3 * place), Costs(1.2 * fixed, place, PASS))
    end = said[-1].now
    for one in said:
        # How long answers are is not known before some have ended, and never of the last few.
        most = 2.0 if one.ended >= len(asked) / 10 else 3.0
        slack = 2 * one.seconds + 0.03 * end
        if one.now > 60 and one.ended < len(asked) - 3:
            assert one.found <= most * (end - one.now) + slack
            assert end - one.now <= most * one.found + slack


def test_unfinished_answers_say_that_answers_are_long() -> None:
    lengths = Lengths()
    takes = Expected(10, 100)
    before = remaining(lengths.hazards([]), 0, 100, 0.5)
    long = [Answering(0, 80, takes)] * 20
    assert remaining(lengths.hazards(long), 0, 100, 0.5) > 1.5 * before
    for _ in range(20):
        lengths.note(25, 100, ended=True)
    assert 15 < remaining(lengths.hazards([]), 0, 100, 0.5) < 35
    assert remaining(lengths.hazards([]), 99, 100, 0.1) == 1


@given(
    st.lists(st.tuples(st.integers(1, 200), st.booleans()), max_size=40),
    st.integers(0, 199),
    st.floats(0, 1, exclude_max=True),
)
def test_what_remains_is_within_what_is_allowed(
    known: list[tuple[int, bool]], made: int, chance: float
) -> None:
    lengths = Lengths()
    for length, ended in known:
        lengths.note(length, 200, ended=ended)
    hazards = lengths.hazards([Answering(0, made, Expected(5, 200))])
    assert all(0 <= hazard <= 1 for hazard in hazards)
    found = remaining(hazards, made, 200, chance)
    assert 1 <= found <= 200 - made
    assert found <= remaining(hazards, made, 200, min(0.999, chance + 0.3))


def test_nothing_left_takes_no_time() -> None:
    forecast = Forecast(Costs(1.0, 0.1, PASS), 1000, MOST)
    assert forecast.seconds(forecast.left([], [])) == 0
    assert forecast.seconds(forecast.left([Answering(5, 0, Expected(5, 4))], [])) > 1
