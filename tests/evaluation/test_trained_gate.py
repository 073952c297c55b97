"""What has to be shown of a fine-tuned version before it becomes champion."""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from phi3_mlflow.evaluation.gate import Verdict, check_thresholds, trained_verdict
from phi3_mlflow.evaluation.junit import junit_xml
from phi3_mlflow.evaluation.measurement import Measurement
from phi3_mlflow.evaluation.settings import Bound, Margin, TrainedGateSettings
from phi3_mlflow.evaluation.task import gain_kept
from phi3_mlflow.stages.records import VerdictRecord
from tests.evaluation.measurements import at_the_task, measurement

HALF = [i % 2 == 0 for i in range(200)]
TEXTS = tuple(np.random.default_rng(3).uniform(0.05, 0.5, size=12))
GENERAL = measurement(HALF, TEXTS)
ROWS = 60
CHAMPION = "models:/m/1"


def right(share: float, seed: int = 0, rows: int = ROWS) -> list[bool]:
    return [bool(flag) for flag in np.random.default_rng(seed).random(rows) < share]


def judge(
    found: Measurement,
    base: Measurement,
    champion: Measurement | None = None,
    wanted: TrainedGateSettings | None = None,
) -> Verdict:
    return trained_verdict(
        check_thresholds(found.metrics, {}),
        found,
        base,
        champion,
        wanted or TrainedGateSettings(),
        CHAMPION if champion else None,
    )


BASE = at_the_task(GENERAL, [False] * ROWS)
GOOD = at_the_task(GENERAL, right(0.9))


def test_the_first_one_that_has_learnt_its_task_and_forgotten_nothing_becomes_champion() -> None:
    verdict = judge(GOOD, BASE)
    assert verdict.decision == "promote"
    assert "better than the untrained base in: task done right" in verdict.why
    assert "shown not to be worse than allowed in: perplexity, questions answered right" in (
        verdict.why
    )


def test_without_a_champion_what_has_learnt_nothing_is_refused() -> None:
    verdict = judge(at_the_task(GENERAL, [False] * ROWS), BASE)
    assert verdict.decision == "refuse"
    assert not verdict.passed
    assert verdict.reasons[0].startswith("not shown to be better: task done right: 0.0%")


def test_as_good_as_the_champion_is_not_enough() -> None:
    verdict = judge(GOOD, BASE, GOOD)
    assert verdict.decision == "keep"
    assert verdict.passed
    assert "not shown to be better: task done right" in verdict.why


def test_better_than_the_champion_takes_its_place() -> None:
    verdict = judge(at_the_task(GENERAL, [True] * ROWS), BASE, at_the_task(GENERAL, right(0.6)))
    assert verdict.decision == "promote"
    assert verdict.against == CHAMPION
    assert "better than the champion in: task done right" in verdict.why


def test_worse_at_the_task_than_the_champion_is_refused() -> None:
    verdict = judge(at_the_task(GENERAL, right(0.4, 1)), BASE, GOOD)
    assert verdict.decision == "refuse"
    assert "worse by" in verdict.why


def test_a_gain_at_the_task_does_not_pay_for_what_was_forgotten() -> None:
    forgot = at_the_task(measurement([False] * 100 + HALF[100:], TEXTS), [True] * ROWS)
    verdict = judge(forgot, BASE)
    assert verdict.decision == "refuse"
    assert any("questions answered right" in reason for reason in verdict.reasons)
    assert list(VerdictRecord.model_validate(verdict.to_dict()).reasons) == verdict.reasons


def test_what_is_neither_shown_nor_denied_is_told_as_such() -> None:
    wanted = TrainedGateSettings(not_worse={"accuracy": Margin(by=0)})
    noisy = at_the_task(measurement([not flag for flag in HALF], TEXTS), [True] * ROWS)
    verdict = judge(noisy, BASE, None, wanted)
    assert verdict.decision == "refuse"
    (reason,) = verdict.reasons
    assert reason.startswith("not shown to be within what is allowed: questions answered right")


def test_small_losses_do_not_add_up_from_one_champion_to_the_next() -> None:
    """Each is within the margin of the champion before it; the base tells."""
    wanted = TrainedGateSettings(not_worse={"perplexity": Margin(percent=10)})
    champion = at_the_task(measurement(HALF, [kl + 0.08 for kl in TEXTS]), right(0.5))
    version = at_the_task(measurement(HALF, [kl + 0.16 for kl in TEXTS]), [True] * ROWS)
    verdict = judge(version, BASE, champion, wanted)
    states = {(c.metric, c.than): c.state for c in verdict.comparisons}
    assert states["perplexity", "champion"] == "not worse"
    assert states["perplexity", "base"] == "worse"
    assert verdict.decision == "refuse"


def test_too_few_rows_show_nothing_and_it_is_said() -> None:
    few = at_the_task(GENERAL, [True] * 10)
    verdict = judge(few, at_the_task(GENERAL, [False] * 10), at_the_task(GENERAL, [False] * 10))
    assert verdict.decision == "keep"
    assert "too few items in common with the champion to tell" in verdict.why


def test_without_rows_set_aside_nothing_is_shown() -> None:
    verdict = judge(GENERAL, GENERAL)
    assert verdict.decision == "refuse"
    assert "task done right: was not measured of the untrained base" in verdict.reasons[0]


def test_a_margin_asks_for_a_gain_of_that_size() -> None:
    """30 of 60 against 24 of 60, all of them the champion's and six more: certain, but small."""
    champion = at_the_task(GENERAL, [i < 24 for i in range(ROWS)])
    version = at_the_task(GENERAL, [i < 34 for i in range(ROWS)])
    assert judge(version, BASE, champion).decision == "promote"
    wanted = TrainedGateSettings(better={"task_accuracy": Margin(by=0.2)})
    verdict = judge(version, BASE, champion, wanted)
    assert verdict.decision == "keep"
    assert "to be better by more than 20.0%" in verdict.why


def test_the_loss_on_the_task_can_be_what_counts() -> None:
    wanted = TrainedGateSettings(better={"task_loss": Margin(by=0)})
    noise = np.random.default_rng(1).uniform(0.9, 1.1, ROWS)
    champion = at_the_task(GENERAL, [False] * ROWS, [float(n) for n in noise])
    version = at_the_task(GENERAL, [False] * ROWS, [float(0.8 * n) for n in noise])
    assert judge(version, BASE, champion, wanted).decision == "promote"
    assert judge(champion, BASE, version, wanted).decision == "refuse"


def test_thresholds_hold_for_fine_tuned_versions_too() -> None:
    failed = check_thresholds({}, {"task_gain_kept": Bound(min=0.9)})
    verdict = trained_verdict(failed, GOOD, BASE, None, TrainedGateSettings(), None)
    assert verdict.decision == "refuse"
    assert "task_gain_kept was not measured" in verdict.why


def test_continuous_integration_sees_what_was_not_shown() -> None:
    root = ElementTree.fromstring(junit_xml("m", judge(GOOD, BASE, GOOD)).partition("\n")[2])
    (skipped,) = [case for case in root if case.find("skipped") is not None]
    assert skipped.attrib["name"] == "task_accuracy better"
    assert root.attrib["failures"] == "0"
    root = ElementTree.fromstring(junit_xml("m", judge(BASE, BASE)).partition("\n")[2])
    assert root.attrib["failures"] == "1"


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.floats(0.1, 0.9))
def test_the_same_answers_never_replace_the_champion(seed: int, share: float) -> None:
    same = at_the_task(GENERAL, right(share, seed))
    assert judge(same, BASE, same).decision != "promote"


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.floats(0.2, 0.8))
def test_two_models_never_take_each_others_place(seed: int, share: float) -> None:
    one = at_the_task(GENERAL, right(share, seed))
    other = at_the_task(GENERAL, right(share, seed + 1))
    decisions = [judge(one, BASE, other).decision, judge(other, BASE, one).decision]
    assert decisions.count("promote") <= 1


def test_chance_alone_seldom_promotes() -> None:
    """Two models that are right as often as each other, at random: at most 5 % of 200."""
    promoted = sum(
        judge(
            at_the_task(GENERAL, right(0.7, 2 * trial)),
            BASE,
            at_the_task(GENERAL, right(0.7, 2 * trial + 1)),
        ).decision
        == "promote"
        for trial in range(200)
    )
    assert promoted <= 10


def test_the_share_of_the_gain_that_is_kept() -> None:
    assert gain_kept(0.8, 0.2, 0.9) == pytest.approx(6 / 7)
    assert gain_kept(0.2, 0.2, 0.2) is None
    assert gain_kept(0.1, 0.4, 0.3) is None


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"better": {}}, "at least 1"),
        ({"better": {"accuracy": {"by": 0}}}, "there are task_accuracy, task_loss"),
        ({"not_worse": {"kl_mean": {"by": 0}}}, "unknown metric kl_mean"),
        ({"better": {"task_loss": {}}}, "either by"),
    ],
)
def test_margins_that_cannot_be_meant_are_refused(values, problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        TrainedGateSettings.model_validate(values)
