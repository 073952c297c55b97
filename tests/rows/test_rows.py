"""Files of rows: the same rows from every format, and each fault with its place."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from phi3_mlflow.core.errors import UserError
from phi3_mlflow.rows import lines
from phi3_mlflow.rows.faults import NOTHING, BrokenFile, FaultList, shown
from phi3_mlflow.rows.files import open_rows
from phi3_mlflow.rows.location import local_path
from phi3_mlflow.rows.strict_json import read_json

ROWS = [{"a": "one", "b": "two\nlines"}, {"a": "é"}, {"b": '"quoted", and more'}]


def write(path: Path, rows: list[dict[str, str]] = ROWS) -> Path:
    """The rows in the format of the suffix."""
    if path.suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps(row) for row in rows), "utf-8")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, ["a", "b"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        table = [{"a": row.get("a"), "b": row.get("b")} for row in rows]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path)
    return path


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("rows.jsonl", ["line 1", "line 3", "line 5"]),
        ("rows.csv", ["line 2", "line 4", "line 5"]),
        ("rows.parquet", ["row 1", "row 2", "row 3"]),
    ],
)
def test_every_format_gives_the_same_rows_and_their_places(
    name: str, places: list[str], tmp_path: Path
) -> None:
    records = list(open_rows(write(tmp_path / name)).records())
    assert [record.values for record in records] == ROWS
    assert [record.where for record in records] == places
    assert not any(record.fault for record in records)


@pytest.mark.parametrize(
    ("line", "field", "told"),
    [
        (b'{"a": NaN}', "JSON", "cannot be read as JSON: NaN is not JSON"),
        (b'{"a": -Infinity}', "JSON", "cannot be read as JSON: -Infinity is not JSON"),
        (b'{"a": {"b": 1, "b": 2}}', "JSON", "names the same key twice"),
        (b'{"a": "\xff"}', "JSON", "not UTF-8 at byte 7"),
        (b"[" * 100_000, "JSON", "cannot be read as JSON"),
        (b'"text"', "row", "expected an object, found 'text'"),
        (b"null", "row", "expected an object, found nothing"),
        (b'{"a": "' + b"x" * 3000 + b'"}', "length", "longer than 2,000 bytes"),
    ],
)
def test_a_line_that_cannot_be_read_is_a_fault_between_rows(
    line: bytes, field: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 2000 if field == "length" else 200_000
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", limit)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n' + line + b'\n{"a": 2}\n')
    first, fault, last = open_rows(path).records()
    assert (first.values, last.values) == ({"a": 1}, {"a": 2})
    assert fault.where == "line 2"
    assert fault.fault is not None
    assert fault.fault.field == field
    assert told in str(fault.fault)


def test_a_csv_row_that_cannot_be_read_is_a_fault_between_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"a,b\n1,2\n1\n1,2,3\n\xff,2\n\n5,\n")
    records = list(open_rows(path).records())
    assert [record.where for record in records] == [f"line {n}" for n in (2, 3, 4, 5, 7)]
    assert [str(record.fault or "") for record in records] == [
        "",
        "1 cells where the header has 2",
        "3 cells where the header has 2: ['3']",
        "not UTF-8",
        "",
    ]
    assert records[-1].values == {"a": "5"}


@pytest.mark.parametrize(
    ("content", "where", "told"),
    [
        (b"a,a\n1,2\n", "line 1", "different from each other; found ['a', 'a']"),
        (b"a,\xff\n1,2\n", "line 1", "named in UTF-8"),
        (b'a,b\n1,2\n"3,4\n5,6\n', "line 3", "the record that begins in line 3 cannot be read"),
        (b'a,b\n1,"2"3\n', "line 2", "the record that begins in line 2 cannot be read"),
    ],
)
def test_a_csv_file_whose_structure_is_broken_says_where(
    content: bytes, where: str, told: str, tmp_path: Path
) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    with pytest.raises(BrokenFile) as broken:
        list(open_rows(path).records())
    assert broken.value.where == where
    assert told in str(broken.value)
    assert str(broken.value).startswith(f"{path}: ")


def test_a_parquet_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 no")
    with pytest.raises(BrokenFile, match="cannot be read as Parquet"):
        list(open_rows(path).records())
    column = pyarrow.array(["1"])
    table = pyarrow.Table.from_arrays([column, column], names=["a", "a"])
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(BrokenFile, match="a column is there twice"):
        list(open_rows(path).records())


@pytest.mark.parametrize(("name", "told"), [("none.csv", "no such file"), ("rows.txt", "allowed")])
def test_what_is_no_file_of_rows_is_refused(name: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("a\n")
    with pytest.raises(UserError, match=told):
        open_rows(tmp_path / name)


def test_all_faults_are_told_at_once_up_to_a_limit() -> None:
    faults = FaultList()
    faults.refuse("nothing")
    for number in range(300):
        faults.add(f"line {number}", "id", "x" * 500 if number else NOTHING, "should be short")
    with pytest.raises(UserError) as refused:
        faults.refuse("file.csv")
    told = str(refused.value).splitlines()
    assert told[0] == "file.csv: 300 problems:"
    assert told[1] == "  - line 0: id: should be short"
    assert told[2].startswith("  - line 1: id: found 'xxx")
    assert told[-1] == "  - and 100 more"
    assert all(len(line) < 130 for line in told)


def test_a_value_is_shown_in_ascii_and_cut() -> None:
    assert [shown(None), shown("é"), shown(["a"])] == ["nothing", "'\\xe9'", "['a']"]
    assert len(shown("x" * 1000)) == 200


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", '{"a": 1, "a": 1}', "", "{"])
def test_json_is_strict(text: str) -> None:
    with pytest.raises(ValueError):
        read_json(text)


def test_a_path_is_found_from_a_uri_or_a_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_path("~/a.csv") == tmp_path / "a.csv"
    assert local_path((tmp_path / "a b.csv").as_uri()) == tmp_path / "a b.csv"
    assert local_path(tmp_path) == tmp_path
