"""The rows that a model is validated with, kept beside it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from phi3_mlflow.core.errors import UserError
from phi3_mlflow.stages.row_checks import refuse_faulty_checks
from phi3_mlflow.training.conversations import Conversation, Message
from phi3_mlflow.training.task import VALIDATION, write_validation

if TYPE_CHECKING:
    from pathlib import Path

EXACT = {"kind": "exact", "value": "4"}


def row(number: int, check: dict[str, object] | None = None) -> Conversation:
    said = [
        Message("system", "Coun\u0165."),
        Message("user", f"{number}?"),
        Message("assistant", "4"),
    ]
    return Conversation.of(said, f"line {number}", check)


def test_the_rows_in_use_are_written_once_each_in_their_order(tmp_path: Path) -> None:
    rows = [row(3, EXACT), row(1), row(3), row(2)]
    write_validation(tmp_path, rows, {rows[0].id, rows[1].id})
    lines = (tmp_path / VALIDATION).read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {
            "id": rows[0].id,
            "messages": [
                {"role": "system", "content": "Coun\u0165."},
                {"role": "user", "content": "3?"},
                {"role": "assistant", "content": "4"},
            ],
            "check": EXACT,
        },
        {
            "id": rows[1].id,
            "messages": [
                {"role": "system", "content": "Coun\u0165."},
                {"role": "user", "content": "1?"},
                {"role": "assistant", "content": "4"},
            ],
        },
    ]


def test_no_file_where_there_are_no_rows(tmp_path: Path) -> None:
    write_validation(tmp_path, [row(1)], set())
    assert not list(tmp_path.iterdir())


def test_checks_that_are_none_are_told_by_file_and_line() -> None:
    files = {
        "a.jsonl": [row(11, {"kind": "exact"}), row(2, {"kind": "guess"}), row(3, EXACT)],
        "b.jsonl": [row(5), row(4, {**EXACT, "more": 1})],
    }
    with pytest.raises(UserError) as refused:
        refuse_faulty_checks(files)
    told = str(refused.value).splitlines()
    assert told[0] == "a.jsonl: 2 problems:"
    assert told[1].startswith("  - line 2: check: found {'kind': 'guess'}; ")
    assert "'exact', 'regex', 'numeric', 'json'" in told[1]
    assert told[2].startswith("  - line 11: check.exact.value: ")
    assert told[3] == "b.jsonl: 1 problem:"
    assert told[4].startswith("  - line 4: check.exact.more: found 1; ")
    refuse_faulty_checks({"a.jsonl": [row(1), row(2, EXACT)]})
