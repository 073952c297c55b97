"""The example data set: reproduced by its script, sound, balanced, and no row nearly another."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from phi3_mlflow.training.conversations import Conversation
from phi3_mlflow.training.data import load_training
from phi3_mlflow.training.overlap import find_overlaps, texts_of

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "tickets"
FILES = {"rows/tickets.jsonl": 300, "more_tickets.jsonl": 150}


def rows(name: str) -> tuple[Conversation, ...]:
    return load_training(FOLDER / name, validation_share=0).train


def noted(row: Conversation) -> dict[str, str | None]:
    found = json.loads(row.messages[-1].content)
    assert isinstance(found, dict)
    return found


def test_the_script_writes_the_files(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "make_tickets.py"), str(tmp_path)]
    subprocess.run(command, check=True, env={"PYTHONHASHSEED": "7"})
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


@pytest.mark.parametrize(("name", "count"), FILES.items())
def test_rows_are_sound_and_balanced(name: str, count: int) -> None:
    read = rows(name)
    assert len(read) == count
    assert {tuple(message.role for message in row.messages) for row in read} == {
        ("system", "user", "assistant")
    }
    assert len({row.messages[0] for row in read}) == 1
    assert all(list(noted(row)) == ["team", "urgency", "product"] for row in read)
    teams = Counter(noted(row)["team"] for row in read)
    assert set(teams) == {"accounts", "billing", "delivery", "repairs", "sales"}
    assert set(teams.values()) == {count // 5}
    assert min(Counter(noted(row)["urgency"] for row in read).values()) > count // 6
    assert max(Counter(noted(row)["product"] for row in read).values()) < count // 2


def test_the_second_batch_has_products_that_the_first_has_not() -> None:
    first, second = ({noted(row)["product"] for row in rows(name)} for name in FILES)
    assert second - first == {"e-reader", "rice cooker", "router", "fan heater"}


def test_no_message_is_nearly_another() -> None:
    read = [row for name in FILES for row in rows(name)]
    read = [replace(row, where=str(number)) for number, row in enumerate(read)]
    found = find_overlaps(read, texts_of(read, "row"))
    assert [o for o in found if o.name != f"row {o.where}"] == []
    assert len(found) == len(read)


def test_some_rows_are_set_aside() -> None:
    data = load_training(FOLDER / "rows" / "tickets.jsonl")
    assert 25 <= len(data.validation) <= 40
    assert data.format == "messages"
    assert data.ignored == ()
