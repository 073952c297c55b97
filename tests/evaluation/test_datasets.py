"""Files of questions and texts: read whatever their format, or refused with all that is wrong."""

from __future__ import annotations

import contextlib
import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3_mlflow.core.errors import UserError
from phi3_mlflow.evaluation import checks
from phi3_mlflow.evaluation import datasets as ds
from phi3_mlflow.evaluation.items import Question
from phi3_mlflow.rows.location import without_secrets
from tests.conftest import Workspace

QUESTIONS = ds.load_questions()

GOOD = {
    "id": "a",
    "category": "facts",
    "messages": [{"role": "user", "content": "What is the capital of Spain?"}],
    "check": {"kind": "exact", "value": "Madrid"},
}


def write_jsonl(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_every_fault_of_a_file_is_named_with_its_line(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "broken.jsonl",
        GOOD,
        {**GOOD, "id": "", "messages": [{"role": "bot", "content": "x"}], "max_tokens": 0},
        '{"id": "c", ',
        "",
        ["not", "an", "object"],
        {**GOOD, "id": "d", "check": {"kind": "exactly", "value": "x"}},
        {**GOOD, "id": "e", "check": {"kind": "regex", "pattern": "("}, "chek": 1},
        {**GOOD, "id": "f", "check": {"kind": "json", "schema": {"typ": "object"}}},
        GOOD,
        {"id": "g", "category": "facts", "check": GOOD["check"]},
        {**GOOD, "id": "h", "check": {"kind": "numeric", "value": "many", "tolerance": -1}},
        {**GOOD, "id": "i", "messages": [{"role": "assistant", "content": "x"}]},
        '{"id": "j", "id": "k"}',
        {**GOOD, "id": "l", "check": {"kind": "regex", "pattern": "x*"}},
    )
    with pytest.raises(UserError) as caught:
        ds.load_questions(path)
    message = str(caught.value)
    for expected in [
        r"broken\.jsonl",
        r"line 2: id: found ''; .*pattern",
        r"line 2: messages\.0\.role: found 'bot'; .*'system', 'user' or 'assistant'",
        r"line 2: max_tokens: found 0; .*greater than or equal to 1",
        r"line 3: JSON: ",
        r"line 5: row: found \['not', 'an', 'object'\]",
        r"line 6: check: .*'exact', 'regex', 'numeric', 'json'",
        r"line 7: check\.regex: .*regular expression",
        r"line 7: chek: unknown; allowed are id, category, messages",
        r"line 8: check\.json\.schema\.typ: unknown; allowed are type, properties",
        r"line 9: id: found 'a'; should be unique, but line 1 has it too",
        r"line 10: messages: is missing",
        r"line 11: check\.numeric\.value: found 'many'",
        r"line 11: check\.numeric\.tolerance: found -1",
        r"line 12: messages: .*role 'user'",
        r"line 13: JSON: .*same key twice",
        r"line 14: check\.regex: .*empty answer",
    ]:
        assert re.search(expected, message), f"{expected}\nnot in\n{message}"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("gone.jsonl", None, "no such file"),
        ("notes.txt", b"hello", "allowed are .jsonl, .csv, .parquet"),
        ("empty.jsonl", b"\n\n", "should be at least one"),
        ("empty.csv", b"", "should be at least one"),
        ("latin.jsonl", b'{"id": "\xe9"}\n', "line 1: JSON"),
        ("latin.csv", b"id,prompt,answer\n1,\xe9,x\n", "line 2: encoding"),
        ("wide.csv", b"id,prompt,answer\n1,x,y,z\n", "line 2: columns"),
        ("twice.csv", b"id,id\n1,2\n", "line 1: columns"),
        ("multi.csv", b'id,prompt,answer\n1,"a\nb",x\n1,c,y\n', "line 4: id: .*line 2 has it too"),
        (
            "cell.csv",
            b"id,category,messages,check\na,b,[,x\n",
            "line 2: messages: .*should be JSON",
        ),
        ("not.parquet", b"PAR?", "not a readable Parquet file"),
    ],
)
def test_unusable_files(tmp_path: Path, name: str, content: bytes | None, expected: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=expected):
        ds.load_questions(tmp_path / name)


def test_a_file_uri_is_read(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a b.jsonl", GOOD)
    assert ds.load_questions(path.as_uri()) == ds.load_questions(str(path))


def test_a_uri_is_downloaded_by_mlflow(workspace: Workspace) -> None:
    import mlflow

    file = write_jsonl(workspace.folder / "q.jsonl", GOOD)
    mlflow.set_tracking_uri(workspace.tracking_uri)
    with mlflow.start_run() as run:
        mlflow.log_artifact(str(file))
    rows = ds.load_questions(f"runs:/{run.info.run_id}/q.jsonl")
    assert rows == ds.load_questions(file)
    secret = "mlflow-artifacts://user:pass@127.0.0.1:9/q.jsonl?token=pass"
    with pytest.raises(UserError, match="cannot be downloaded") as refused:
        ds.load_questions(f"runs:/{'0' * 32}/q.jsonl")
    assert "Give a path, or a URI" in str(refused.value)
    assert without_secrets(secret) == "mlflow-artifacts://127.0.0.1:9/q.jsonl"


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet

    kinds = [q for q in QUESTIONS if q.category in ("facts", "json", "arithmetic")][:60]
    rows = [json.loads(q.model_dump_json(by_alias=True, exclude_defaults=True)) for q in kinds]
    flat = [
        {**r, "messages": json.dumps(r["messages"]), "check": json.dumps(r["check"])} for r in rows
    ]
    write_jsonl(tmp_path / "q.jsonl", *rows)
    with (tmp_path / "q.csv").open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, fieldnames=sorted({k for r in flat for k in r}))
        writer.writeheader()
        writer.writerows(flat)
    names = sorted({k for r in flat for k in r})
    table = pa.table({name: [r.get(name) for r in flat] for name in names})
    pa.parquet.write_table(table, tmp_path / "q.parquet")
    datasets.Dataset(table).save_to_disk(tmp_path / "q")
    for name in ("q.jsonl", "q.csv", "q.parquet", "q"):
        assert ds.load_questions(tmp_path / name) == kinds, name

    nested = [r for r in rows if r["check"]["kind"] == "numeric"]
    pa.parquet.write_table(pa.Table.from_pylist(nested), tmp_path / "nested.parquet")
    assert ds.load_questions(tmp_path / "nested.parquet") == [
        q for q in kinds if q.check.kind == "numeric"
    ]
    datasets.DatasetDict({"test": datasets.Dataset(table)}).save_to_disk(tmp_path / "dict")
    with pytest.raises(UserError, match="several splits; give one: test"):
        ds.load_questions(tmp_path / "dict")
    assert ds.load_questions(tmp_path / "dict" / "test") == kinds


def test_prompt_and_answer_are_enough(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("prompt,answer\nCapital of Spain?,Madrid\n", "utf-8")
    (row,) = ds.load_questions(tmp_path / "mine.csv")
    assert (row.id, row.category) == ("line-2", "custom")
    assert checks.check_answer(row.check, "Madrid, of course")


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*GOOD, "kind", "value", "schema", "pattern", "role", "content", "x"]),
            inner,
        )
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(st.lists(ANY_JSON.map(json.dumps) | st.text(max_size=30), min_size=1, max_size=5))
def test_any_file_is_read_or_refused(tmp_path_factory: Any, lines: list[str]) -> None:
    path = tmp_path_factory.mktemp("any") / "any.jsonl"
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    with contextlib.suppress(UserError):
        assert all(isinstance(row, Question) for row in ds.load_questions(path))


@settings(deadline=None)
@given(st.text(max_size=200))
def test_any_csv_is_read_or_refused(tmp_path_factory: Any, text: str) -> None:
    path = tmp_path_factory.mktemp("any") / "any.csv"
    path.write_bytes(("id,prompt,answer\n" + text).encode("utf-8", "surrogatepass"))
    with contextlib.suppress(UserError):
        assert all(isinstance(row, Question) for row in ds.load_questions(path))


def test_digest_ignores_key_order_and_defaults_and_sees_the_rest(tmp_path: Path) -> None:
    other = {**GOOD, "id": "b"}
    plain = ds.load_questions(write_jsonl(tmp_path / "1.jsonl", GOOD, other))
    spelled = {**dict(reversed(GOOD.items())), "max_tokens": 64, "quick": False}
    same = ds.load_questions(write_jsonl(tmp_path / "2.jsonl", spelled, "", other))
    turned = ds.load_questions(write_jsonl(tmp_path / "3.jsonl", other, GOOD))
    assert ds.digest(plain) == ds.digest(same)
    assert len({ds.digest(plain), ds.digest(turned), ds.digest(plain[:1]), ds.digest([])}) == 4
