"""What a person sees of long work in a log."""

from __future__ import annotations

import pytest

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
