"""Files of rows: what is read, what is refused, and that rows are written as they were."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3_mlflow.core.errors import UserError
from phi3_mlflow.rows import lines
from phi3_mlflow.scoring.files import open_scored
from phi3_mlflow.scoring.requests import COLUMNS, Result
from tests.scoring.conftest import read_jsonl, write_jsonl

ANSWER = Result("yes", "stop", 7, 1)
ASKED = {"messages": [{"role": "user", "content": "Hi"}]}


def written(file: Path, result: Any = lambda index: ANSWER) -> Path:
    out = file.with_name(f"out{file.suffix}")
    open_scored(file).write(out, result)
    return out


def test_a_jsonl_row_keeps_every_byte_and_is_added_to(tmp_path: Path) -> None:
    lines = [
        '{"prompt": "é", "n": 1.50, "big": 123456789012345678901234567890, "e": 1E5}',
        '  {"messages":[{"role":"user","content":"Hi"}] , "x":{"}":"{"} }  ',
    ]
    file = tmp_path / "in.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n\n".join(lines).encode())  # no end of line at the end
    out = written(file)
    added = '"response": "yes", "finish_reason": "stop", "prompt_tokens": 7, '
    added += '"completion_tokens": 1, "error": null}'
    assert out.read_text("utf-8").splitlines() == [
        lines[0].removesuffix("}") + ", " + added,
        lines[1].strip().removesuffix("}").rstrip() + ", " + added,
    ]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"prompt": "a"', "line 2: cannot be read as JSON"),
        (b"\xff\xfe", "line 2: cannot be read as JSON: not UTF-8 at byte 0"),
        (b'{"prompt": NaN}', "line 2: cannot be read as JSON"),
        (b'{"prompt": "a", "prompt": "b"}', "names the same key twice"),
        (b"[" * 100_000, "line 2: cannot be read as JSON"),
        (b"[1]", "line 2: expected an object, found [1]"),
        (b"{}", "line 2: has neither a prompt nor messages"),
        (b'{"prompt": ""}', "line 2: has neither a prompt nor messages"),
        (b'{"prompt": "a", "messages": [1]}', "line 2: has both prompt and messages"),
        (b'{"prompt": 5}', "line 2: prompt: expected a text, found 5"),
        (b'{"messages": {"role": "user"}}', "line 2: messages: expected a list of messages"),
        (b'{"messages": "[1"}', "line 2: messages: cannot be read as JSON"),
        (b'{"messages": ["a"]}', "line 2: messages[0]: expected an object with role and content"),
        (b'{"messages": [{"role": "user"}]}', "messages[0].content: expected a text, found noth"),
        (b'{"messages": [{"role": "user", "content": "a", "image": "b"}]}', "unknown fields: ['i"),
    ],
)
def test_a_bad_line_is_a_row_with_an_error_between_good_ones(
    line: bytes, words: str, tmp_path: Path
) -> None:
    file = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "a"}, line, ASKED])
    source = open_scored(file)
    source.check_columns()
    rows = list(source.requests())
    assert [row.error is None for row in rows] == [True, False, True]
    assert [row.index for row in rows] == [0, 1, 2]
    assert words in rows[1].error
    assert rows[2].body == ASKED
    assert len(rows[1].error) < 500
    answers = read_jsonl(written(file, lambda i: Result(error=rows[i].error) if i == 1 else ANSWER))
    assert [row["error"] for row in answers] == [row.error for row in rows]


def test_a_line_too_long_to_be_a_row_is_never_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 1000)
    long = json.dumps({"prompt": "x" * 5000})
    file = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "a"}, long, {"prompt": "b"}])
    rows = list(open_scored(file).requests())
    assert [row.body for row in rows] == [{"prompt": "a"}, None, {"prompt": "b"}]
    assert rows[1].error == "line 2: longer than 1,000 bytes"
    assert read_jsonl(written(file))[1]["line"] == 2
    table = tmp_path / "in.csv"
    table.write_text(f'prompt\na\n"{"x" * 5000}"\n')
    with pytest.raises(UserError, match="line 3 is longer than 1,000 bytes"):
        open_scored(table).check_columns()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("in.jsonl", b"", "holds no rows"),
        ("in.jsonl", b"\n \n", "holds no rows"),
        ("in.jsonl", b"nonsense\n", "found: no readable row"),
        ("in.jsonl", b'{"question": "a"}\n', "neither a column prompt nor messages; found: 'que"),
        ("in.jsonl", b'{"prompt": "a"}\n{"prompt": "b", "error": 1}\n', "line 2: has error, which"),
        ("in.csv", b"", "found: no readable row"),
        ("in.csv", b"prompt\n", "holds no rows"),
        ("in.csv", b"a,b\n1,2\n", "found: 'a', 'b'"),
        ("in.csv", b"prompt,prompt\n1,2\n", "different from each other"),
        ("in.csv", b"prompt,\xff\n1,2\n", "named in UTF-8"),
        ("in.csv", b"prompt,response\n1,2\n", "has response, which scoring adds"),
        ("in.csv", b'prompt,n\na,1\n"b,2\nc,3\n', "record that begins in line 3 cannot be read"),
        ("in.csv", b'prompt,n\n"a"b,1\n', "record that begins in line 2 cannot be read"),
        ("in.parquet", b"PAR1 no", "cannot be read as Parquet"),
        ("in.xlsx", b"", "allowed are .jsonl"),
    ],
)
def test_a_file_that_cannot_be_scored_is_refused(
    name: str, content: bytes, words: str, tmp_path: Path
) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(UserError) as refused:
        open_scored(file).check_columns()
    assert words in str(refused.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    for name in ("none.jsonl", "folder.csv"):
        with pytest.raises(UserError, match="no such file"):
            open_scored(tmp_path / name)


def test_csv_cells_are_kept_and_bad_rows_carry_their_error(tmp_path: Path) -> None:
    file = tmp_path / "in.csv"
    file.write_bytes(
        b'id,prompt,messages\r\n1,"two\r\nlines, and ""quotes""",\r\n\r\n2,a\r\n3,\xff,\r\n'
        b'4,,"[{""role"": ""user"", ""content"": ""Hi""}]"\r\n5,a,,surplus\r\n'
    )
    source = open_scored(file)
    source.check_columns()
    rows = list(source.requests())
    assert rows[0].body == {"prompt": 'two\r\nlines, and "quotes"'}
    assert rows[3].body == ASKED
    assert [row.error for row in rows] == [
        None,
        "line 5: 2 cells where the header has 3",
        "line 6: not UTF-8",
        None,
        "line 8: 4 cells where the header has 3: ['surplus']",
    ]
    raw = written(file, lambda i: Result(error=rows[i].error) if rows[i].error else ANSWER)
    assert raw.read_bytes().count(b"\r\n") == 7
    with raw.open(encoding="utf-8", newline="") as stream:
        table = list(csv.reader(stream))
    assert table[0] == ["id", "prompt", "messages", *COLUMNS]
    assert table[1] == ["1", 'two\r\nlines, and "quotes"', "", "yes", "stop", "7", "1", ""]
    assert table[3][:3] == ["3", "�", ""]
    assert table[3][-1] == "line 6: not UTF-8"
    assert [len(cells) for cells in table] == [8] * 6


def test_parquet_columns_keep_their_types(tmp_path: Path) -> None:
    file = tmp_path / "in.parquet"
    message = pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())])
    schema = pyarrow.schema(
        [("messages", pyarrow.list_(message)), ("prompt", pyarrow.large_string()),
         ("day", pyarrow.date32()), ("price", pyarrow.decimal128(9, 2))],
        metadata={"made": "here"},
    )  # fmt: skip
    rows = [
        {"messages": ASKED["messages"], "prompt": None, "day": None, "price": None},
        {"messages": None, "prompt": "a", "day": None, "price": None},
        {"messages": None, "prompt": None, "day": None, "price": None},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), file)
    source = open_scored(file)
    source.check_columns()
    found = list(source.requests())
    assert [row.body for row in found] == [ASKED, {"prompt": "a"}, None]
    assert found[2].error == "row 3: has neither a prompt nor messages"
    results = [ANSWER, ANSWER, Result(error=found[2].error)]
    table = pyarrow.parquet.read_table(written(file, results.__getitem__))
    assert table.schema.names == [*schema.names, *COLUMNS]
    assert [table.schema.field(name).type for name in schema.names] == schema.types
    assert table.schema.metadata[b"made"] == b"here"
    assert table.column("completion_tokens").to_pylist() == [1, 1, None]
    assert table.select(schema.names).to_pylist() == rows


texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
names = texts.filter(lambda name: name not in (*COLUMNS, "prompt", "messages"))


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.dictionaries(names, plain, max_size=4), min_size=1, max_size=6),
       answers=st.lists(texts, min_size=6, max_size=6))  # fmt: skip
def test_any_jsonl_row_comes_back_with_its_answer(
    rows: list[dict[str, Any]], answers: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("rows") / "in.jsonl"
    rows = [{**row, "prompt": f"p{at}"} for at, row in enumerate(rows)]
    write_jsonl(file, [json.dumps(row, ensure_ascii=at % 2 == 0) for at, row in enumerate(rows)])
    assert [row.body for row in open_scored(file).requests()] == [
        {"prompt": row["prompt"]} for row in rows
    ]
    out = written(file, lambda index: Result(answers[index]))
    found = [json.loads(line) for line in out.read_bytes().split(b"\n")[:-1]]
    for row, answer, got in zip(rows, answers, found, strict=False):
        assert got == {**row, **dict.fromkeys(COLUMNS), "response": answer}


cells = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(cells, cells), min_size=1, max_size=6))
def test_any_csv_row_comes_back_with_its_answer(
    rows: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("rows") / "in.csv"
    with file.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, quoting=csv.QUOTE_ALL).writerows([("prompt", "other"), *rows])
    source = open_scored(file)
    source.check_columns()
    assert [row.body for row in source.requests()] == [{"prompt": prompt} for prompt, _ in rows]
    with written(file).open(encoding="utf-8", newline="") as stream:
        table = list(csv.reader(stream))[1:]
    assert [tuple(line[:2]) for line in table] == rows
