"""Training rows: read from every kind of file, split by their content, refused all at once."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3_mlflow.core.errors import UserError
from phi3_mlflow.training import data as training_data
from phi3_mlflow.training.conversations import Conversation, Message
from phi3_mlflow.training.data import load_training, split


def pair(number: int, answer: str = "yes") -> dict[str, str]:
    return {"prompt": f"Is {number} a number?", "completion": answer}


def conversation(number: int) -> Conversation:
    said = pair(number)
    return Conversation.of(
        [Message("user", said["prompt"]), Message("assistant", said["completion"])]
    )


PAIRS = [pair(number) for number in range(40)]


def write(path: Path, rows: list[dict[str, Any]] = PAIRS) -> Path:
    """Rows in the kind of file that the suffix says; without one, a saved dataset."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        import datasets

        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet", "rows"])
def test_every_kind_of_file_gives_the_same_rows_on_the_same_sides(
    name: str, tmp_path: Path
) -> None:
    read = load_training(write(tmp_path / name))
    train, validation = split([conversation(number) for number in range(40)], 0.1)
    assert [row.messages for row in read.train] == [row.messages for row in train]
    assert [row.id for row in read.validation] == [row.id for row in validation]
    assert read.validation
    assert (read.format, read.ignored) == ("prompt_completion", ())
    assert read.validation_sha256 is None
    if name.endswith("l"):
        assert read.train[0].where == "line 1"
        assert read.data_sha256 == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()


def test_messages_that_parquet_nests(tmp_path: Path) -> None:
    asked = ({"role": "user", "content": f"{number}"} for number in range(40))
    rows = [{"messages": [user, {"role": "assistant", "content": "x"}]} for user in asked]
    read = load_training(write(tmp_path / "rows.parquet", rows))
    assert read.format == "messages"
    assert len(read.train) + len(read.validation) == 40


def test_columns_that_are_not_read_are_named(tmp_path: Path) -> None:
    rows = [{**row, "source": "mine", "id": number} for number, row in enumerate(PAIRS)]
    assert load_training(write(tmp_path / "rows.jsonl", rows)).ignored == ("id", "source")


@given(
    st.sets(st.integers(0, 10**6), max_size=60),
    st.sets(st.integers(0, 10**6), max_size=60),
    st.floats(0, 1),
    st.randoms(use_true_random=False),
)
def test_more_rows_in_another_order_move_no_row(old, new, share, random) -> None:
    before = [conversation(number) for number in sorted(old)]
    after = before + [conversation(number) for number in sorted(new)]
    random.shuffle(after)
    train, validation = split(before, share)
    more_train, more_validation = split(after, share)
    assert set(train) <= set(more_train)
    assert set(validation) <= set(more_validation)
    assert not {row.id for row in more_train} & {row.id for row in more_validation}
    assert len(more_train) + len(more_validation) == len(after)


@given(st.floats(0, 1), st.floats(0, 1))
def test_a_larger_share_only_adds_to_validation(one, other) -> None:
    rows = [conversation(number) for number in range(50)]
    low, high = sorted((one, other))
    assert set(split(rows, low)[1]) <= set(split(rows, high)[1])
    assert split(rows, 0) == (tuple(rows), ())
    assert split(rows, 1) == ((), tuple(rows))


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3])
def test_the_share_is_about_what_is_set_aside(share) -> None:
    held = len(split([conversation(number) for number in range(5000)], share)[1])
    assert abs(held / 5000 - share) < 4 * (share * (1 - share) / 5000) ** 0.5


def test_faults_are_said_at_once_the_first_twenty_by_name(tmp_path: Path) -> None:
    rows = [pair(number, "" if number % 2 else "yes") for number in range(60)]
    path = write(tmp_path / "rows.jsonl", rows)
    with path.open("a") as file:
        file.write("{broken\n")
    with pytest.raises(UserError) as refused:
        load_training(path)
    told = str(refused.value).splitlines()
    assert told[0] == f"{path}: 31 problems:"
    assert told[1] == "  - line 2: completion: found ''; should not be empty"
    assert told[20].startswith("  - line 40: completion: ")
    assert told[21:] == ["  - and 11 more"]


def test_a_row_that_is_no_json_is_among_the_faults(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "x", "completion": "y"}\n{broken\n[1]\n{"prompt": "x"}\n')
    with pytest.raises(UserError) as refused:
        load_training(path)
    told = str(refused.value)
    assert "3 problems" in told
    assert "line 2: JSON: " in told
    assert "line 3: row: " in told
    assert "line 4: completion: is missing" in told


def test_the_faults_of_both_files_are_said_at_once(tmp_path: Path) -> None:
    train = write(tmp_path / "rows.jsonl", [*PAIRS, {"prompt": "x", "completion": ""}])
    held = write(tmp_path / "held.jsonl", [pair(70), pair(71, " ")])
    with pytest.raises(UserError) as refused:
        load_training(train, validation=held)
    assert "rows.jsonl: 1 problem:\n  - line 41: completion" in str(refused.value)
    assert "held.jsonl: 1 problem:\n  - line 2: completion" in str(refused.value)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([], "whole file: rows: there should be at least two"),
        ([pair(1)], "there is one row only"),
        ([pair(1)] * 5, "none of the 5 rows is set aside for validation"),
        ([{"text": "x"}], "columns: found ['text']; should be those of one format (messages: "),
        ([{**pair(1), "messages": []}], "could be messages or prompt_completion; choose with"),
        ([{}], "columns: found []; should be those of one format"),
    ],
)
def test_rows_that_cannot_be_used(rows, told, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        load_training(write(tmp_path / "rows.jsonl", rows))
    assert told in str(refused.value)


def test_all_rows_set_aside(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="all 40 rows are set aside for validation"):
        load_training(write(tmp_path / "rows.jsonl"), validation_share=1)


def test_no_validation_where_none_is_asked_for(tmp_path: Path) -> None:
    read = load_training(write(tmp_path / "rows.jsonl", [pair(1)]), validation_share=0)
    assert (len(read.train), read.validation) == (1, ())


def test_the_format_can_be_chosen(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    rows = [{**row, "messages": said} for row in PAIRS]
    path = write(tmp_path / "rows.jsonl", rows)
    assert load_training(path, format="prompt_completion").ignored == ("messages",)
    assert load_training(path, format="messages", validation_share=0).format == "messages"
    with pytest.raises(UserError, match="format is 'chatml'; allowed are auto, messages, prompt_"):
        load_training(path, format="chatml")
    with pytest.raises(UserError, match="line 1: instruction: is missing"):
        load_training(path, format="alpaca")


def test_a_file_of_its_own_for_validation(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl")
    held = write(tmp_path / "held.csv", [pair(3), pair(70)])
    read = load_training(path, validation=held)
    assert (len(read.train), len(read.validation)) == (40, 2)
    assert read.validation_sha256 == hashlib.sha256(held.read_bytes()).hexdigest()


@pytest.mark.parametrize("rows", [PAIRS, PAIRS[5:9], [PAIRS[0], PAIRS[0]]])
def test_validation_rows_that_are_all_trained_on_are_refused(rows, tmp_path: Path) -> None:
    path, held = write(tmp_path / "rows.jsonl"), write(tmp_path / "held.jsonl", rows)
    with pytest.raises(UserError, match=rf"every one of its {len(rows)} rows is also in"):
        load_training(path, validation=held)


def test_a_file_that_changes_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "rows.jsonl")
    read = training_data.read_conversation

    def read_and_write(record, known, faults):
        if record.where == "line 20":
            with path.open("a") as file:
                file.write(json.dumps(pair(99)) + "\n")
        return read(record, known, faults)

    monkeypatch.setattr(training_data, "read_conversation", read_and_write)
    with pytest.raises(UserError, match="changed while it was read; try again"):
        load_training(path)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("rows.txt", b"x", "not a dataset"),
        ("rows.parquet", b"x", "whole file: Parquet: "),
        ("rows.csv", b'prompt,completion\nx,"y\n', "CSV: cannot be read"),
    ],
)
def test_files_that_cannot_be_read(name, content, told, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as refused:
        load_training(tmp_path / name)
    assert told in str(refused.value)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_training(tmp_path / "rows.jsonl")
