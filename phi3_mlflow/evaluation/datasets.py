"""The evaluation sets: which rows a file of questions or texts may hold, and loading them.

The project ships its own sets in `data/` (see `data/README.md`); a user may bring a file instead:
JSONL, CSV, Parquet, or a directory written by `datasets.Dataset.save_to_disk`, on this machine or
wherever MLflow downloads from.

    questions = load_questions()                    # the shipped set
    questions = load_questions("mine.csv")          # the user's own, same rules
    ok = checks.check_answer(questions[0].check, "Paris.")
    fingerprint = digest(questions)

A row of a question file is written out in full (`id`, `category`, `messages`, `check`,
`max_tokens`) or, for the simplest case, as the two columns `prompt` and `answer`. In CSV, and
wherever a format cannot nest, `messages` and `check` are JSON text in one cell.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from phi3_mlflow.core.errors import UserError
from phi3_mlflow.core.shipped import shipped
from phi3_mlflow.evaluation.checks import ExactCheck, JsonCheck, NumericCheck, RegexCheck, Shape
from phi3_mlflow.evaluation.items import CalibrationText, HeldoutText, Message, Needle, Question
from phi3_mlflow.rows.faults import NOTHING, BrokenFile, FaultList
from phi3_mlflow.rows.files import open_rows
from phi3_mlflow.rows.location import local_path
from phi3_mlflow.rows.strict_json import read_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from pydantic_core import ErrorDetails

    from phi3_mlflow.rows.records import Record

DATA_DIR = shipped("data")
"""The sets that the project ships."""

_JSON_CELLS = ("messages", "check")  # JSON text, where a format cannot nest

Item = TypeVar("Item", Question, HeldoutText, CalibrationText, Needle)


def load_questions(source: str | Path | None = None, quick: bool = False) -> list[Question]:
    """Read questions: the shipped `data/questions.jsonl`, or the user's own file or directory.

    Args:
        source: a path, a `file:` URI or a URI that MLflow downloads from; None: the shipped set.
        quick: the subset of a quick run only.

    Returns:
        The questions in the file's order.

    Raises:
        UserError: naming every faulty row and field.
    """
    return _load(Question, source, "questions.jsonl", quick)


def load_heldout(source: str | Path | None = None, quick: bool = False) -> list[HeldoutText]:
    """Read held-out documents (`data/heldout.jsonl`); otherwise like `load_questions`."""
    return _load(HeldoutText, source, "heldout.jsonl", quick)


def load_calibration(source: str | Path | None = None) -> list[CalibrationText]:
    """Read calibration texts (`data/calibration.jsonl`); otherwise like `load_questions`."""
    return _load(CalibrationText, source, "calibration.jsonl", False)


def load_needles(source: str | Path | None = None, quick: bool = False) -> list[Needle]:
    """Read recipes of long prompts (`data/needle.jsonl`); otherwise like `load_questions`."""
    return _load(Needle, source, "needle.jsonl", quick)


def _load(model: type[Item], source: str | Path | None, shipped_as: str, quick: bool) -> list[Item]:
    path = local_path(DATA_DIR / shipped_as if source is None else source)
    file = open_rows(path)
    faults = FaultList()
    items: list[Item] = []
    seen: dict[str, str] = {}
    try:
        for record in file.records():
            item = _item(model, record, faults)
            if item is None:
                continue
            if item.id in seen:
                told = f"should be unique, but {seen[item.id]} has it too"
                faults.add(record.where, "id", item.id, told)
            seen.setdefault(item.id, record.where)
            items.append(item)
    except BrokenFile as broken:
        if not broken.where:
            told = f"{path}: not a readable {file.kind}: {broken.fault.reason}"
            raise UserError(told) from None
        faults.add_fault(broken.where, broken.fault)
    if not items and not faults:
        faults.add("whole file", "rows", NOTHING, "there should be at least one")
    faults.refuse(path)
    return quick_subset(items) if quick else items


def quick_subset(items: Sequence[Item], size: int = 40) -> list[Item]:
    """The items marked `quick`; of a set without marks about `size`, evenly spread."""
    marked = [item for item in items if getattr(item, "quick", False)]
    return marked or list(items[:: max(1, math.ceil(len(items) / size))])


def _item(model: type[Item], record: Record, faults: FaultList) -> Item | None:
    """The item that a row holds; None when there is something wrong with it, which is noted."""
    if record.fault:
        faults.add_fault(record.where, record.fault)
        return None
    values = _nested(record, faults)
    if values is None:
        return None
    try:
        return model.model_validate(_completed(values, record.where, model))
    except ValidationError as error:
        for fault in error.errors(include_url=False, include_context=False):
            _explain(model, record.where, fault, faults)
        return None


def _nested(record: Record, faults: FaultList) -> dict[str, Any] | None:
    """A row's values, those that are JSON text read."""
    values = dict(record.values)
    readable = True
    for name in _JSON_CELLS:
        text = values.get(name)
        if isinstance(text, str):
            try:
                values[name] = read_json(text)
            except (ValueError, RecursionError) as error:
                faults.add(record.where, name, text, f"should be JSON: {error}")
                readable = False
    return values if readable else None


def _completed(row: Mapping[str, Any], where: str, model: type[BaseModel]) -> Mapping[str, Any]:
    """Write a `prompt`/`answer` row out in full; leave every other row as it is."""
    if model is not Question or not {"prompt", "answer"} <= row.keys() or "messages" in row:
        return row
    full = {"id": where.replace(" ", "-"), "category": "custom", **row}
    full["messages"] = [{"role": "user", "content": full.pop("prompt")}]
    full["check"] = {"kind": "exact", "value": full.pop("answer")}
    return full


def _explain(model: type[BaseModel], where: str, fault: ErrorDetails, faults: FaultList) -> None:
    loc, allowed, value = fault["loc"], fault["msg"].removeprefix("Value error, "), fault["input"]
    if fault["type"] == "missing":
        value, allowed = NOTHING, "is missing"
    elif fault["type"] == "extra_forbidden":
        value, allowed = NOTHING, f"unknown; allowed are {', '.join(_keys_at(model, loc[:-1]))}"
    faults.add(where, ".".join(map(str, loc)) or "row", value, allowed)


def _keys_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    known: dict[Any, type[BaseModel]] = {"messages": Message, "schema": Shape}
    known |= {"exact": ExactCheck, "regex": RegexCheck, "numeric": NumericCheck, "json": JsonCheck}
    inner = next((known[part] for part in reversed(loc) if part in known), model)
    return [field.alias or name for name, field in inner.model_fields.items()]


def digest(items: Sequence[BaseModel]) -> str:
    """Fingerprint a set: two runs are comparable when they saw the same digest.

    Args:
        items: validated. The order of keys, spaces and defaults written out or left out do not
            count; the order of the items does (batches, and so the last digits of a metric,
            depend on it).

    Returns:
        The sha256 over one canonical JSON line per item, as hex.
    """
    sha = hashlib.sha256()
    for item in items:
        plain = item.model_dump(mode="json", by_alias=True)
        line = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        sha.update(line.encode() + b"\n")
    return sha.hexdigest()
