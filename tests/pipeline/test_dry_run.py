"""Why a step would run again, down to the file."""

from __future__ import annotations

from pathlib import Path

from phi3_mlflow.pipeline.dry_run import changed_parts
from phi3_mlflow.pipeline.inputs import rows_input
from tests.steps.test_train_step import write_rows


def parts(folder: Path) -> dict[str, object]:
    return {"inputs": {"data": rows_input("train.data", folder).identity}}


def test_of_several_files_of_rows_the_one_that_changed_is_named(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", 0, 9)
    write_rows(tmp_path / "b.jsonl", 9, 18)
    before = parts(tmp_path)
    assert changed_parts(before, parts(tmp_path)) == []
    write_rows(tmp_path / "more.jsonl", 18, 27)
    assert changed_parts(before, parts(tmp_path)) == ["inputs.data.more.jsonl (new)"]
    write_rows(tmp_path / "b.jsonl", 27, 28)
    (tmp_path / "a.jsonl").unlink()
    assert changed_parts(before, parts(tmp_path)) == [
        "inputs.data.a.jsonl (gone)", "inputs.data.b.jsonl", "inputs.data.more.jsonl (new)",
    ]  # fmt: skip


def test_a_single_file_of_rows_is_an_input_like_any_other(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", 0, 9)
    before = parts(file)
    write_rows(file, 9, 10)
    assert changed_parts(before, parts(file)) == ["inputs.data"]
    assert changed_parts(before, parts(tmp_path)) == ["inputs.data"]
