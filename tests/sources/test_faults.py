"""Whatever goes wrong: never a wrong file, never a leftover, never a traceback, never a token."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.sources.faults import FAULTS, RECOVERS, Fault, matches, run_fault


@pytest.mark.parametrize("one", FAULTS, ids=lambda one: f"{one.kind}: {one.name}")
def test_fault_leaves_nothing_wrong_behind(one: Fault, tmp_path: Path) -> None:
    result = run_fault(one, tmp_path)
    assert result.outcome == one.outcome, result.message
    assert result.wrong_files == []
    assert result.leftovers == []
    assert result.miscounted == []
    assert not result.token_seen
    assert not result.had_traceback
    if one.outcome != RECOVERS:
        assert result.exit_code != 0
        assert matches(one, result), result.message


def test_faults_are_many_and_distinct() -> None:
    assert len({one.name for one in FAULTS}) == len(FAULTS) >= 40
    assert len(Counter(one.kind for one in FAULTS)) >= 8
