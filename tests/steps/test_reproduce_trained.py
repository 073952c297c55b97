"""A fine-tuned version made again from its recipe: the same files, or a reason why not."""

from __future__ import annotations

from pathlib import Path

import pytest

from phi3_mlflow.core.errors import EXIT_BAD_INPUT
from tests.conftest import Workspace
from tests.fixtures.tiny_line import write_profile
from tests.steps.test_train_step import SETTINGS, write_rows, write_texts

MIXED = {"algorithm": "gptq", "calibration_tokens": 1024, "calibration_length": 64,
         "calibration_rows": 0.5}  # fmt: skip
STEPS = ("fetch", "train", "quantize", "export", "log", "register")


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, Path]:
    """Version 1 of `tiny`, trained on a folder of rows."""
    place = Workspace(tmp_path_factory.mktemp("again"))
    (place.folder / "rows").mkdir()
    write_rows(place.folder / "rows" / "tickets.jsonl", 0, 40)
    write_texts(place.folder / "general.jsonl")
    train = {"data": "rows", "rehearsal": "general.jsonl", **SETTINGS}
    profile = write_profile(place.folder, train=train, quantization=MIXED)
    for step in STEPS:
        done = place.step(step, "--profile", str(profile))
        assert done.returncode == 0, done.stdout + done.stderr
    return place, profile


@pytest.mark.slow
def test_it_comes_out_the_same_although_more_rows_have_come(line) -> None:
    place, profile = line
    write_rows(place.folder / "rows" / "more_tickets.jsonl", 40, 60)
    done = place.step("reproduce", "--profile", str(profile), "--version", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same: " in done.stderr
    assert "trained on" in done.stderr


@pytest.mark.slow
def test_a_changed_row_is_refused_and_moved_rows_are_taken_from_elsewhere(line) -> None:
    place, profile = line
    rows = place.folder / "rows" / "tickets.jsonl"
    before = rows.read_text("utf-8")
    rows.write_text(before.replace("Ticket 7:", "Ticket 77:"), "utf-8")
    done = place.step("reproduce", "--profile", str(profile), "--version", "1")
    assert done.returncode == EXIT_BAD_INPUT, done.stdout + done.stderr
    assert "train.data: tickets.jsonl (sha256 " in done.stderr
    assert "-P data=" in done.stderr
    elsewhere = place.folder / "archive"
    elsewhere.mkdir()
    (elsewhere / "tickets.jsonl").write_text(before, "utf-8")
    options = ("--profile", str(profile), "--version", "1", "--data", str(elsewhere))
    done = place.step("reproduce", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same: " in done.stderr
