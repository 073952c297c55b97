"""What a person sees of long work in a log."""

from __future__ import annotations

import random
import re
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3_mlflow.core import console, progress
from phi3_mlflow.core.progress import no_progress, show_progress


@pytest.fixture(autouse=True)
def loud() -> None:
    console.set_quiet(False)


def test_a_log_gets_plain_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_LINE_EVERY_SECONDS", 0.0)
    with show_progress("copying", 4_000_000) as meter:
        meter.advance(1_000_000)
        meter.advance(3_000_000)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("  copying: 1.0 of 4.0 MB (25 %), 0 s, ")
    assert lines[0].endswith("s left")
    assert lines[-1].startswith("  copying: 4.0 of 4.0 MB (100 %)")
    assert all("\r" not in line and "\x1b" not in line for line in lines)


def test_the_last_line_is_printed_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_LINE_EVERY_SECONDS", 0.0)
    with show_progress("questions", 2, "answered") as meter:
        meter.advance(1)
        meter.advance(1)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in lines] == [
        "  questions: 1 of 2 answered (50 %)",
        "  questions: 2 of 2 answered (100 %)",
    ]


def test_of_a_share_only_the_percentage_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_LINE_EVERY_SECONDS", 0.0)
    with show_progress("computing", 4000, "share") as meter:
        meter.advance(1000)
    assert capsys.readouterr().err.splitlines()[0].startswith("  computing: 25 %, 0 s, ")


def test_units_are_counted_and_a_total_may_be_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress("rows", None, "rows") as meter:
        meter.advance(3)
    assert capsys.readouterr().err.startswith("  rows: 3 rows, ")


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    console.set_quiet(True)
    with show_progress("copying", 10) as meter:
        meter.advance(10)
    with no_progress("copying", 10) as meter:
        meter.advance(10)
    assert capsys.readouterr().err == ""
    console.set_quiet(False)


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: self.now))

    def estimates(
        self,
        capsys: pytest.CaptureFixture[str],
        steps: list[tuple[float, int, float | None]],
    ) -> list[tuple[float, float, float]]:
        """Show work step by step: seconds, amount, and work where it is known beforehand.

        Returns:
            Of every line: seconds since the beginning, those it says are left, and those that were.
        """
        begin = self.now
        work = None if steps[0][2] is None else sum(step[2] or 0 for step in steps)
        with show_progress("some", sum(step[1] for step in steps), "pieces", work) as meter:
            for seconds, amount, share in steps:
                self.now += seconds
                meter.advance(amount, share)
        took = self.now - begin
        lines = capsys.readouterr().err.splitlines()
        said = [re.search(r"(\d+) s, (\d+) s left", line) for line in lines]
        found = [(float(one[1]), float(one[2])) for one in said if one]
        return [(at, left, took - at) for at, left in found]


def within_two(lines: list[tuple[float, float, float]], slack: float) -> bool:
    """Whether no estimate after the first minute is out by a factor of two; seconds of slack."""
    late = [line for line in lines if line[0] > 60]
    assert len(late) > 5
    return all(left <= 2 * real + slack and real <= 2 * left + slack for _, left, real in late)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("reading", "answering"), [(850.0, 126.0), (20.0, 5.0)])
def test_long_prompts_at_the_end_are_foreseen(
    reading: float, answering: float, seed: int,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    chance = random.Random(seed)
    short = [(chance.randint(20, 120), chance.randint(16, 128)) for _ in range(240)]
    long = [(chance.randint(1000, 7000), 32) for _ in range(24)]
    steps = []
    for prompt, most in (*short, *long):
        seconds = prompt / reading + chance.uniform(0.2, 1) * most / answering
        steps.append((seconds, 1, prompt + 2.0 * most))
    clock = Clock(monkeypatch)
    weighed = clock.estimates(capsys, steps)
    assert within_two(weighed, slack=max(step[0] for step in steps))
    counted = clock.estimates(capsys, [(seconds, amount, None) for seconds, amount, _ in steps])
    assert not within_two(counted, slack=max(step[0] for step in steps))


def test_who_knows_better_is_believed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    with show_progress("some", 3, "pieces") as meter:
        for left in (500.0, 7.0, 0.0):
            clock.now += 10
            meter.advance(1, left=left)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(", ")[1:] for line in lines] == [
        ["10 s", "500 s left"], ["20 s", "7 s left"], ["30 s"],
    ]  # fmt: skip


def test_a_slow_beginning_is_forgotten(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [(30.0, 1, None), *[(0.5, 1, None)] * 400]
    assert within_two(Clock(monkeypatch).estimates(capsys, steps), slack=1)


def test_another_speed_is_believed_when_it_has_lasted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick, slow = [(1.0, 1, None)] * 100, [(10.0, 1, None)] * 300
    lines = Clock(monkeypatch).estimates(capsys, [*quick, *slow])
    at_last = [line for line in lines if line[0] > 200]
    assert within_two(at_last, slack=10)
    assert all(left == pytest.approx(real, abs=12) for _, left, real in at_last)


def test_what_is_taken_back_has_to_be_done_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [(10.0, 10, None), (10.0, 10, None), (10.0, -15, None), *[(10.0, 10, None)] * 2]
    lines = Clock(monkeypatch).estimates(capsys, steps)
    assert [at for at, _, _ in lines] == [10, 20, 30, 40]
    assert all(left > 0 for _, left, _ in lines)


@given(st.lists(st.tuples(st.floats(0.01, 50), st.integers(1, 9)), min_size=1, max_size=500))
def test_at_one_speed_the_estimate_is_exact_and_little_is_kept(
    steps: list[tuple[float, int]],
) -> None:
    now = [0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
        work = sum(seconds for seconds, _ in steps)
        done = progress._Done("some", None, "pieces", work)
        for seconds, amount in steps:
            now[0] += seconds
            done.add(amount, seconds)
            left = done.left(now[0])
            assert left is None or left == pytest.approx(work - now[0], abs=1e-6 * work)
            assert len(done._known) <= progress._POINTS + 2
            assert all(one[0] < other[0] for one, other in pairwise(done._known))
