"""Which files rows are read from, and what identifies them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3_mlflow.artifacts.manifests import sha256_of_file
from phi3_mlflow.core.errors import UserError
from phi3_mlflow.training.data import load_training
from phi3_mlflow.training.row_files import row_files


def write(file: Path, first: int, last: int, answer: str = "Team") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": f"Ticket {i} is broken.", "completion": f"{answer} {i % 3}."}
            for i in range(first, last)]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_single_file_is_identified_by_its_content_alone(tmp_path: Path) -> None:
    one, other = write(tmp_path / "a.jsonl", 0, 9), write(tmp_path / "b.jsonl", 0, 9)
    assert row_files(one).digest == row_files(other).digest == sha256_of_file(one)
    assert (row_files(one).paths, row_files(one).hashes) == ((one,), {})


def test_a_folder_is_read_in_the_order_of_the_names(tmp_path: Path) -> None:
    second, first = write(tmp_path / "b.jsonl", 9, 18), write(tmp_path / "a.jsonl", 0, 9)
    (tmp_path / "README.md").write_text("what this is")
    found = row_files(tmp_path)
    assert found.paths == (first, second)
    assert found.hashes == {"a.jsonl": sha256_of_file(first), "b.jsonl": sha256_of_file(second)}
    read = load_training(tmp_path, validation_share=0)
    assert [row.where for row in read.train[8:10]] == ["a.jsonl, line 9", "b.jsonl, line 1"]
    assert [row.id for row in read.train] == [
        row.id for file in (first, second) for row in load_training(file, validation_share=0).train
    ]
    assert read.data_sha256 == found.digest


def test_a_pattern_takes_what_it_names(tmp_path: Path) -> None:
    wanted = [write(tmp_path / name, 0, 5) for name in ("north/1.jsonl", "south/1.jsonl")]
    write(tmp_path / "north/2.jsonl", 5, 9)
    found = row_files(tmp_path / "*" / "1.jsonl")
    assert found.paths == tuple(wanted)
    assert list(found.hashes) == ["north/1.jsonl", "south/1.jsonl"]
    literal = write(tmp_path / "what[1].jsonl", 0, 5)
    assert row_files(literal).paths == (literal,)


def test_another_file_moves_no_row_of_those_before(tmp_path: Path) -> None:
    write(tmp_path / "m.jsonl", 0, 60)
    before = load_training(tmp_path)
    write(tmp_path / "a.jsonl", 60, 90)
    after = load_training(tmp_path)
    assert {row.id for row in before.train} < {row.id for row in after.train}
    assert {row.id for row in before.validation} <= {row.id for row in after.validation}
    assert before.data_sha256 != after.data_sha256


@given(st.dictionaries(st.sampled_from("abcd"), st.integers(1, 4), min_size=1))
def test_the_digest_knows_names_and_contents(tmp_path_factory, files: dict[str, int]) -> None:
    folder = tmp_path_factory.mktemp("rows")
    for name, count in files.items():
        write(folder / f"{name}.jsonl", 0, count)
    digest = row_files(folder).digest
    (folder / "notes.txt").write_text("no rows")
    assert row_files(folder).digest == digest
    name = min(files)
    write(folder / f"{name}.jsonl", 0, files[name], "Desk")
    assert row_files(folder).digest != digest
    write(folder / f"{name}.jsonl", 0, files[name])
    assert row_files(folder).digest == digest
    (folder / f"{name}.jsonl").rename(folder / f"{name}{name}.jsonl")
    assert row_files(folder).digest != digest


def test_nothing_to_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file of rows in .*; looked for \.jsonl"):
        row_files(tmp_path)
    with pytest.raises(UserError, match="no file of rows"):
        row_files(tmp_path / "*.jsonl")


def test_what_is_wrong_in_several_files_is_said_at_once(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", 0, 9)
    (tmp_path / "b.jsonl").write_text('{"prompt": "x", "completion": ""}\n')
    (tmp_path / "c.jsonl").write_text("{\n")
    with pytest.raises(UserError) as told:
        load_training(tmp_path)
    assert "b.jsonl: 1 problem" in str(told.value)
    assert "c.jsonl: 1 problem" in str(told.value)
