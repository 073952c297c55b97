"""Speeds that were measured beside other programs: told, measured again, and not held for facts."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3_mlflow.config.loading import load_profile
from phi3_mlflow.evaluation import load
from phi3_mlflow.evaluation.again import ROUNDS, time_again
from phi3_mlflow.evaluation.answers import (
    FEWEST_TIMED,
    NEEDLE,
    Answer,
    Answers,
    other_load,
    spread,
    undisturbed,
)
from phi3_mlflow.evaluation.gate import against_champion, check_thresholds
from phi3_mlflow.evaluation.junit import junit_xml
from phi3_mlflow.evaluation.load import (
    LIMIT,
    OTHER_LOAD,
    LoadWatch,
    Readings,
    measured_while,
    share_of_others,
    unsound,
)
from phi3_mlflow.evaluation.report.bought import bought
from phi3_mlflow.evaluation.settings import Bound, Margin
from phi3_mlflow.stages.card import model_card
from tests.evaluation.measurements import answer, measurement

BUSY, QUIET = 0.5, 0.02


def counted(
    busy: float, own: float, *, there: float = 2, group: float | None = None
) -> tuple[Readings, Readings]:
    """What a system with some cores counts within a second, and had counted before."""
    start = None if group is None else 40.0
    before = Readings(10.0, 100.0, 5.0, start)
    return before, Readings(
        10.0 + busy, 100.0 + there, 5.0 + own, None if start is None else start + (group or 0.0)
    )


@pytest.mark.parametrize(
    ("busy", "own", "share"), [(2.0, 2.0, 0.0), (2.0, 1.0, 0.5), (1.0, 1.2, 0.0), (2.0, 0.0, 1.0)]
)
def test_what_others_use_is_what_this_process_does_not(
    busy: float, own: float, share: float
) -> None:
    assert share_of_others(*counted(busy, own), 1.0, 2) == pytest.approx(share)


@pytest.mark.parametrize(
    ("busy", "group", "share"),
    [(34.0, 2.0, 0.0), (64.0, 2.0, 0.0), (3.0, 3.0, 0.5), (64.0, 3.0, 0.5), (2.0, 1.9, 0.0)],
)
def test_neighbours_disturb_a_container_where_they_leave_it_no_room(
    busy: float, group: float, share: float
) -> None:
    """Two cores of 64 by quota, both in use by this process."""
    found = share_of_others(*counted(busy, 2.0, there=64, group=group), 1.0, 2)
    assert found == pytest.approx(share)


def test_a_machine_that_is_full_leaves_a_container_no_room() -> None:
    assert share_of_others(*counted(64.0, 0.5, there=64, group=0.5), 1.0, 2) == pytest.approx(0.75)


@given(
    st.floats(0, 64), st.floats(0, 64), st.none() | st.floats(0, 64), st.integers(1, 64),
    st.floats(0, 64),
)  # fmt: skip
def test_it_is_a_share_whatever_is_counted(
    busy: float, own: float, group: float | None, cores: int, there: float
) -> None:
    found = share_of_others(*counted(busy, own, there=there, group=group), 1.0, cores)
    assert found is None or 0 <= found <= 1


def test_a_system_that_counts_nothing_is_not_taken_for_a_quiet_one() -> None:
    assert share_of_others(Readings(0, 0, 5), Readings(0, 0, 6), 1.0, 2) is None


@pytest.mark.parametrize(("seconds", "told"), [(0.1, None), (1.0, 0.5)])
def test_too_short_a_time_tells_nothing(
    monkeypatch: pytest.MonkeyPatch, seconds: float, told: float | None
) -> None:
    clock, found = iter((0.0, seconds)), iter(counted(2.0 * seconds, seconds, there=2.0 * seconds))
    monkeypatch.setattr(load, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(load, "_readings", lambda: next(found))
    monkeypatch.setattr(load, "usable_cores", lambda: 2)
    assert LoadWatch().others() == told


def test_this_system_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "_SHORTEST_S", 0.0)
    watch = LoadWatch()
    before = load._readings()
    until = time.process_time() + 0.05
    while time.process_time() < until:
        pass
    after = load._readings()
    assert before.busy <= after.busy
    assert before.whole <= after.whole
    assert after.own > before.own
    others = watch.others()
    assert others is None or 0 <= others <= 1


@given(st.lists(st.none() | st.floats(0, 1), min_size=1, max_size=40))
def test_speeds_come_from_quiet_answers_where_there_are_enough(loads: list[float | None]) -> None:
    timed = [answer(i, others=others) for i, others in enumerate(loads)]
    chosen = undisturbed(timed)
    quiet = [a for a in timed if not a.disturbed]
    assert list(chosen) == (quiet if len(quiet) >= min(FEWEST_TIMED, len(timed)) else timed)
    assert set(quiet) <= set(chosen)
    share = other_load(chosen)
    known = [a.others for a in chosen if a.others is not None]
    assert (share is None) == (not known)
    if share is not None:
        assert min(known) - 1e-9 <= share <= max(known) + 1e-9


def test_the_metrics_say_beside_what_they_were_measured() -> None:
    slow = [answer(i, seconds=10.0, others=BUSY) for i in range(20)]
    quick = [answer(20 + i, seconds=1.0, others=QUIET) for i in range(FEWEST_TIMED)]
    found = Answers((*slow, *quick), 1.0, 1).metrics()
    assert found["tokens_per_second"] == 50
    assert found["timed_answers"] == FEWEST_TIMED
    assert found[OTHER_LOAD] == pytest.approx(QUIET)
    assert found["tokens_per_second_spread"] == 0
    assert not unsound(found)
    assert measured_while(found) == "measured while other programs used 2% of the processor"
    found = Answers(tuple(slow), 1.0, 1).metrics()
    assert unsound(found) == "measured while other programs used 50% of the processor"
    assert not measured_while(Answers((answer(0),), 1.0, 1).metrics())


def test_the_spread_is_that_of_the_middle_half() -> None:
    assert spread([]) == 0
    assert spread([3.0]) == 0
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 / 3)


class Asked:
    """Answers under the loads that it is told."""

    def __init__(self, *loads: float) -> None:
        self.loads = list(loads)
        self.numbers: list[int] = []

    def __call__(self, number: int) -> Answer:
        self.numbers.append(number)
        return answer(number, text="again", seconds=0.25, others=self.loads.pop(0))


def busy(count: int) -> dict[int, Answer]:
    return {i: answer(i, others=BUSY) for i in range(count)}


def test_nothing_is_asked_again_on_a_quiet_machine() -> None:
    ask = Asked()
    quiet = {i: answer(i, others=QUIET) for i in range(FEWEST_TIMED)}
    assert time_again({**busy(30), **quiet}, ask) == {}
    assert time_again({i: answer(i) for i in range(30)}, ask) == {}, "nothing is known of the load"
    assert ask.numbers == []


def test_disturbed_questions_are_timed_again_and_their_answers_stay() -> None:
    ask = Asked(*[QUIET] * FEWEST_TIMED)
    found = time_again(busy(30), ask)
    assert len(ask.numbers) == FEWEST_TIMED
    assert list(found) == ask.numbers
    for told in found.values():
        assert not told.disturbed
        assert told.seconds == 0.25
        assert told.text == "yes"


def test_it_ends_where_the_machine_stays_busy() -> None:
    ask = Asked(*[0.9, 0.3] * FEWEST_TIMED)
    found = time_again(busy(30), ask)
    assert len(ask.numbers) == ROUNDS * FEWEST_TIMED
    assert {told.others for told in found.values()} == {0.3}, "the quieter time counts"


def test_few_questions_are_all_that_is_needed() -> None:
    ask = Asked(QUIET, QUIET)
    needle = {3: answer(3, others=BUSY, category=f"{NEEDLE}1000")}
    time_again({**busy(2), **needle}, ask)
    assert ask.numbers == [0, 1]


@pytest.mark.parametrize(
    ("others", "speed", "passed", "unjudged"),
    [(QUIET, 5.0, False, False), (BUSY, 5.0, True, True), (BUSY, 20.0, True, False)],
)
def test_the_gate_does_not_hold_a_disturbed_speed_against_a_version(
    others: float, speed: float, passed: bool, unjudged: bool
) -> None:
    metrics = {"tokens_per_second": speed, "kl_mean": 0.1, OTHER_LOAD: others}
    verdict = check_thresholds(metrics, {"tokens_per_second": Bound(min=10)})
    (check,) = verdict.checks
    assert (check.passed, check.unjudged) == (passed, unjudged)
    assert ("not judged" in verdict.why) == unjudged
    assert ('skipped="1"' in junit_xml("m", verdict)) == unjudged
    if unjudged:
        assert "while other programs used 50% of the processor; wanted >= 10" in verdict.why
    wrong = check_thresholds(metrics, {"kl_mean": Bound(max=0.01)})
    assert not wrong.passed, "only speeds are excused"


def test_disturbed_answers_are_not_compared_with_the_champions() -> None:
    quiet = measurement([True] * 30)
    busy = measurement([True] * 30)
    slow = tuple(answer(i, seconds=9.0, others=BUSY) for i in range(30))
    busy = type(busy)(busy.metrics, slow, busy.scores, busy.sample)
    margins = {"tokens_per_second": Margin(percent=5)}
    verdict = against_champion(check_thresholds({}, {}), busy, quiet, margins, "models:/m/1")
    assert verdict.comparisons[0].state == "undecided"
    assert verdict.passed


@pytest.mark.parametrize(
    ("mine", "full", "told"), [(QUIET, QUIET, "4.0 times faster"), (BUSY, QUIET, "not compared"),
                               (QUIET, BUSY, "not compared: full precision was measured while")],
)  # fmt: skip
def test_disturbed_speeds_are_not_what_int4_bought(mine: float, full: float, told: str) -> None:
    metrics = {"tokens_per_second": 40.0, "tokens_per_second_full": 10.0}
    metrics |= {OTHER_LOAD: mine, f"{OTHER_LOAD}_full": full, "top1_agreement": 0.9}
    found = bought(metrics)
    assert told in found.rows[0].compared
    assert ("faster" in found.sentence) == (mine < LIMIT and full < LIMIT)


@pytest.mark.parametrize(
    "disturbed", ["", "measured while other programs used 50% of the processor"]
)
def test_a_disturbed_speed_is_not_on_the_card(disturbed: str) -> None:
    figures = {"accuracy": 0.5, "tokens_per_second": 40.0, "time_to_first_token_s": 0.1}
    profile = load_profile("smollm2-135m")
    card = model_card(profile, {}, figures, "a machine", disturbed=disturbed)
    assert "50.0%" in card
    assert ("tokens/s" in card) == ("first token" in card) == (not disturbed)
    assert ("Speed is left out: it was measured while" in card) == bool(disturbed)
