"""Killed at a random moment, the next run ends as if nothing had happened."""

from __future__ import annotations

import pytest

from tests.conftest import Workspace
from tests.fixtures.kill_campaign import kill_campaign, state
from tests.fixtures.tiny_line import write_profile

pytestmark = pytest.mark.slow


def test_a_few_kills_leave_no_trace(tmp_path_factory: pytest.TempPathFactory) -> None:
    undisturbed = Workspace(tmp_path_factory.mktemp("undisturbed"))
    profile = write_profile(undisturbed.folder)
    done = undisturbed.step("main", "--profile", str(profile))
    assert done.returncode == 0, done.stderr
    expected = state(undisturbed)
    assert expected["versions"] == ["1"]
    assert not expected["debris"]
    campaign = kill_campaign(
        Workspace(tmp_path_factory.mktemp("killed")), profile, 3, seed=20, expected=expected
    )
    assert len(campaign.kills) == 3
    assert campaign.problems == []
