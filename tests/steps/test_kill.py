"""Killed at a random moment, the next run ends as if nothing had happened."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Workspace
from tests.fixtures.kill_campaign import kill_campaign, state
from tests.fixtures.tiny_line import write_profile

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The profile, and the state after one run that nobody disturbed."""
    place = Workspace(tmp_path_factory.mktemp("undisturbed"))
    profile = write_profile(place.folder)
    done = place.step("main", "--profile", str(profile))
    assert done.returncode == 0, done.stderr
    expected = state(place)
    assert expected["versions"] == ["1"]
    assert not expected["debris"]
    return profile, expected


def test_a_few_kills_leave_no_trace(undisturbed, tmp_path: Path) -> None:
    profile, expected = undisturbed
    campaign = kill_campaign(Workspace(tmp_path), profile, 3, seed=20, expected=expected)
    assert len(campaign.kills) == 3
    assert campaign.problems == []


def test_two_runs_at_once_end_as_one_does(undisturbed, tmp_path: Path) -> None:
    profile, expected = undisturbed
    place = Workspace(tmp_path)
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "steps.main", "--profile", str(profile)],
            cwd=place.folder, env=place.whole_environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=600) for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert state(place) == expected
    steps = ("fetch", "quantize", "export", "log", "register", "evaluate")
    for step in steps:  # whichever was there first did the work, and the other took it
        lines = [f"step={step} status=done cached={hit}" for hit in ("true", "false")]
        printed = "".join(out for out, _ in said)
        assert [printed.count(line) for line in lines] == [1, 1], printed
