"""The evaluation sets: how files of questions and texts are read, and what is wrong with them.

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

pyarrow, datasets and mlflow are imported only when such a file is read.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlparse, urlsplit, urlunsplit
from urllib.request import url2pathname

from pydantic import BaseModel, ValidationError

from phi3_mlflow.core.errors import UserError, problem_list
from phi3_mlflow.evaluation.checks import (
    ExactCheck,
    JsonCheck,
    NumericCheck,
    RegexCheck,
    Shape,
    no_constant,
)
from phi3_mlflow.evaluation.rows import CalibrationText, HeldoutText, Message, Needle, Question

DATA_DIR = Path(__file__).resolve().parents[2] / "data"
MAX_PROBLEMS_SHOWN = 200
_NOTHING = object()  # stands for "there is no value to show"

Line = TypeVar("Line", Question, HeldoutText, CalibrationText, Needle)


class _Problems(list[str]):
    """What is wrong with one file, gathered so that all of it is told at once."""

    def add(self, where: str, field: str, value: Any, allowed: str) -> None:
        found = "" if value is _NOTHING else f"found {_shown(value)}; "
        self.append(f"{where}: {field}: {found}{allowed}")

    def refuse(self, source: object) -> None:
        shown = self[:MAX_PROBLEMS_SHOWN]
        if len(self) > len(shown):
            shown.append(f"and {len(self) - len(shown)} more")
        if self:
            count = f"{len(self)} problem{'s' if len(self) > 1 else ''}"
            raise UserError(problem_list(f"{source}: {count}", shown))


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def load_questions(source: str | Path | None = None, quick: bool = False) -> list[Question]:
    """Read questions: the shipped `data/questions.jsonl`, or the user's own file or directory.

    Input: a path or file: URI (None for the shipped set); `quick` for the marked subset only.
    Output: the rows in file order. Errors: UserError naming every faulty row and field.
    """
    return _load(Question, source, "questions.jsonl", quick)


def load_heldout(source: str | Path | None = None, quick: bool = False) -> list[HeldoutText]:
    """Read held-out documents (`data/heldout.jsonl`); otherwise like `load_questions`."""
    return _load(HeldoutText, source, "heldout.jsonl", quick)


def load_calibration(source: str | Path | None = None) -> list[CalibrationText]:
    """Read calibration texts (`data/calibration.jsonl`); otherwise like `load_questions`."""
    return _load(CalibrationText, source, "calibration.jsonl", False)


def load_needles(source: str | Path | None = None, quick: bool = False) -> list[Needle]:
    """Read long-context recipes (`data/needle.jsonl`); otherwise like `load_questions`."""
    return _load(Needle, source, "needle.jsonl", quick)


def _load(model: type[Line], source: str | Path | None, shipped: str, quick: bool) -> list[Line]:
    path = _local_path(DATA_DIR / shipped if source is None else source)
    problems = _Problems()
    rows: list[Line] = []
    seen: dict[str, str] = {}
    for where, raw in _raw_rows(path, problems):
        try:
            row = model.model_validate(_completed(raw, where, model))
        except ValidationError as error:
            for fault in error.errors(include_url=False, include_context=False):
                _explain(model, where, fault, problems)
            continue
        if row.id in seen:
            problems.add(where, "id", row.id, f"should be unique, but {seen[row.id]} has it too")
        seen.setdefault(row.id, where)
        rows.append(row)
    if not rows and not problems:
        problems.add("whole file", "rows", _NOTHING, "there should be at least one")
    problems.refuse(path)
    return quick_subset(rows) if quick else rows


def quick_subset(rows: Sequence[Line], size: int = 40) -> list[Line]:
    """Give the rows marked `quick`; in a set without marks, about `size` evenly spread rows."""
    marked = [row for row in rows if getattr(row, "quick", False)]
    return marked or list(rows[:: max(1, math.ceil(len(rows) / size))])


def _local_path(source: str | Path) -> Path:
    text = str(source)
    if text.startswith("file:"):
        return Path(url2pathname(urlparse(text).path))
    if re.match(r"[a-z][a-z0-9+.-]+:/", text):
        return _downloaded(text)
    return Path(text).expanduser()


@lru_cache
def _downloaded(uri: str) -> Path:
    """A copy of what a URI names; one a process, removed when it ends."""
    import atexit
    import shutil
    import tempfile

    import mlflow
    from mlflow.exceptions import MlflowException

    folder = tempfile.mkdtemp(prefix="phi3-mlflow-set-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=folder))
    except (MlflowException, OSError, ImportError, ValueError) as error:
        raise UserError(
            f"{without_secrets(uri)}: cannot be downloaded: {type(error).__name__}\n"
            "Give a path, or a URI that MLflow downloads from, such as runs:/RUN_ID/mine.jsonl or "
            "s3://BUCKET/mine.jsonl."
        ) from error


def without_secrets(uri: str) -> str:
    """A URI without user name, password and query, to be shown."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))


def _raw_rows(path: Path, problems: _Problems) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give (where, row) for each readable row of any format; note what cannot be read."""
    suffix = path.suffix.lower()
    if path.is_dir() and any((path / n).exists() for n in ("state.json", "dataset_dict.json")):
        yield from _nested(_saved_rows(path), problems)
    elif path.is_file() and suffix in (".jsonl", ".ndjson"):
        yield from _nested(_jsonl_rows(path, problems), problems)
    elif path.is_file() and suffix == ".csv":
        yield from _nested(_csv_rows(path, problems), problems)
    elif path.is_file() and suffix in (".parquet", ".pq"):
        yield from _nested(_parquet_rows(path), problems)
    else:
        what = "no such file" if not path.exists() else "not a dataset"
        raise UserError(
            f"{path}: {what}; allowed are .jsonl, .csv, .parquet and a directory that "
            "datasets' save_to_disk wrote"
        )


def _jsonl_rows(path: Path, problems: _Problems) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        where = f"line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(
                line.decode("utf-8-sig" if number == 1 else "utf-8"),
                object_pairs_hook=unique_keys,
                parse_constant=no_constant,
            )
        except (ValueError, RecursionError) as error:
            problems.add(where, "JSON", line.decode("utf-8", "replace"), f"cannot be read: {error}")
            continue
        yield where, row


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("an object names the same key twice")
    return row


def _csv_rows(path: Path, problems: _Problems) -> Iterator[tuple[str, Any]]:
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        problems.add(f"line {line}", "encoding", raw[error.start : error.end], "should be UTF-8")
        return
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        names = reader.fieldnames or []
        if len(set(names)) < len(names):
            problems.add("line 1", "columns", names, "should be different from each other")
            return
        for row in reader:
            cells = [*(row.get(None) or []), *(row[name] or "" for name in names)]
            where = f"line {reader.line_num - sum(cell.count(chr(10)) for cell in cells)}"
            if None in row:
                problems.add(where, "columns", row[None], "more cells than the header has columns")
            else:  # an empty cell is a value that is not given
                yield where, {name: cell for name, cell in row.items() if cell}
    except csv.Error as error:
        problems.add(f"line {reader.line_num}", "CSV", _NOTHING, f"cannot be read: {error}")


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file: {error}") from None
    for number, row in enumerate(table.to_pylist(), start=1):
        yield f"row {number}", without_nulls(row)


def _saved_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import datasets

    if (path / "dataset_dict.json").exists():
        splits = sorted(p.parent.name for p in path.glob("*/state.json"))
        raise UserError(f"{path}: holds several splits; give one: {', '.join(splits) or 'none'}")
    try:
        saved = datasets.load_from_disk(str(path))
        rows = saved.to_list()
    except Exception as error:  # the library raises whatever the broken file provokes
        raise UserError(f"{path}: not a readable saved dataset: {error}") from None
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", without_nulls(row)


def without_nulls(value: Any) -> Any:
    """Drop the nulls a column format fills in where a row has no such key."""
    if isinstance(value, dict):
        return {name: without_nulls(v) for name, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


def _nested(rows: Iterable[tuple[str, Any]], problems: _Problems) -> Iterator[tuple[str, Any]]:
    for where, row in rows:
        if not isinstance(row, dict):
            problems.add(where, "row", row, "should be an object with named fields")
            continue
        readable = True
        for name in ("messages", "check"):
            if isinstance(row.get(name), str):
                try:
                    row[name] = json.loads(row[name], parse_constant=no_constant)
                except (ValueError, RecursionError) as error:
                    problems.add(where, name, row[name], f"should be JSON: {error}")
                    readable = False
        if readable:
            yield where, row


def _completed(row: dict[str, Any], where: str, model: type[BaseModel]) -> dict[str, Any]:
    """Write a `prompt`/`answer` row out in full; leave every other row as it is."""
    if model is not Question or not {"prompt", "answer"} <= row.keys() or "messages" in row:
        return row
    full = {"id": where.replace(" ", "-"), "category": "custom", **row}
    full["messages"] = [{"role": "user", "content": full.pop("prompt")}]
    full["check"] = {"kind": "exact", "value": full.pop("answer")}
    return full


def _explain(model: type[BaseModel], where: str, fault: Any, problems: _Problems) -> None:
    loc, allowed, value = fault["loc"], fault["msg"].removeprefix("Value error, "), fault["input"]
    if fault["type"] == "missing":
        value, allowed = _NOTHING, "is missing"
    elif fault["type"] == "extra_forbidden":
        value, allowed = _NOTHING, f"unknown; allowed are {', '.join(_keys_at(model, loc[:-1]))}"
    problems.add(where, ".".join(map(str, loc)) or "row", value, allowed)


def _keys_at(model: type[BaseModel], loc: tuple[Any, ...]) -> list[str]:
    known: dict[Any, type[BaseModel]] = {"messages": Message, "schema": Shape}
    known |= {"exact": ExactCheck, "regex": RegexCheck, "numeric": NumericCheck, "json": JsonCheck}
    inner = next((known[part] for part in reversed(loc) if part in known), model)
    return [field.alias or name for name, field in inner.model_fields.items()]


def digest(rows: Sequence[BaseModel]) -> str:
    """Fingerprint a dataset: two runs are comparable when they saw the same digest.

    Input: validated rows. Output: sha256 in hex over one canonical JSON line a row. The order of
    keys, spaces and defaults written out or left out do not count; the order of the rows does
    (batches, and so the last digits of a metric, depend on it). Errors: none.
    """
    sha = hashlib.sha256()
    for row in rows:
        plain = row.model_dump(mode="json", by_alias=True)
        line = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        sha.update(line.encode() + b"\n")
    return sha.hexdigest()
