"""Training rows out of a file, and which of them are set aside for validation.

    data = load_training(Path("tickets.jsonl"))
    len(data.train), len(data.validation), data.format

The side that a row is on depends on what it says and on nothing else: more rows, fewer rows or
another order move none of the others, and equal rows are on one side.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from phi3_mlflow.core.errors import UserError
from phi3_mlflow.rows.faults import NOTHING, BrokenFile, FaultList
from phi3_mlflow.rows.files import open_rows
from phi3_mlflow.training.conversations import FORMATS, Conversation, read_conversation, recognised
from phi3_mlflow.training.row_files import row_files

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from phi3_mlflow.rows.records import Record, RowFile
    from phi3_mlflow.training.conversations import Format

AUTO = "auto"
_LISTED = 20  # faults that are told one by one
_HASH_DIGITS = 13  # of an id, in hexadecimal: as many as a float holds exactly


@dataclass(frozen=True)
class TrainingData:
    """Rows to train on and rows to validate with.

    Attributes:
        train: the rows that are trained on, in the order of the files' names and in theirs.
        validation: those that are not; empty where none were asked for.
        format: what the training rows are written in, keys of `FORMATS`.
        data_sha256: of the file, or over all files, as hex; see `row_files`.
        validation_sha256: of what was given as validation, where that was.
        ignored: the columns of the training rows that are not read.
    """

    train: tuple[Conversation, ...]
    validation: tuple[Conversation, ...]
    format: str
    data_sha256: str
    validation_sha256: str | None
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Rows:
    """What one file holds, or several."""

    rows: tuple[Conversation, ...]
    format: str
    ignored: tuple[str, ...]
    sha256: str = ""


def load_training(
    data: Path,
    *,
    format: str = AUTO,
    validation: Path | None = None,
    validation_share: float = 0.1,
) -> TrainingData:
    """Read the rows and set some aside.

    Args:
        data: a JSONL, CSV or Parquet file, a folder that `datasets` saved, a folder of files, or a
            pattern of names as `tickets/*.jsonl`.
        format: a key of `FORMATS`, for all files; `auto` recognises each by its columns.
        validation: rows to validate with, in a place of their own.
        validation_share: without such a file, the share of the rows set aside, from 0 to 1.

    Raises:
        UserError: a file cannot be read or used; names the faults of both by line and field.
    """
    found: list[_Rows] = []
    problems: list[str] = []
    for path in (data, validation) if validation else (data,):
        try:
            found.append(_read(path, format))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    if validation:
        train, held = found[0].rows, found[1].rows
        _refuse_contained(train, held, data, validation)
    else:
        train, held = split(found[0].rows, validation_share)
        _refuse_empty(train, held, data, validation_share)
    return TrainingData(
        train=train,
        validation=held,
        format=found[0].format,
        data_sha256=found[0].sha256,
        validation_sha256=found[1].sha256 if validation else None,
        ignored=found[0].ignored,
    )


def split(
    rows: Sequence[Conversation], validation_share: float
) -> tuple[tuple[Conversation, ...], tuple[Conversation, ...]]:
    """Training and validation rows, told apart by the ids.

    A row that is set aside for one share is also set aside for every larger one.
    """
    limit = validation_share * 16**_HASH_DIGITS
    held = [int(row.id[:_HASH_DIGITS], 16) < limit for row in rows]
    both = list(zip(rows, held, strict=True))
    return tuple(r for r, aside in both if not aside), tuple(r for r, aside in both if aside)


def _refuse_empty(
    train: Sequence[Conversation], held: Sequence[Conversation], data: Path, share: float
) -> None:
    if share > 0 and not (train and held):
        count = len(train) + len(held)
        where = "set aside for validation" if held else "left to train on"
        told = f"all {count} rows are {where}" if count > 1 else "there is one row only"
        if train and count > 1:
            told = f"none of the {count} rows is set aside for validation"
        raise UserError(
            f"{data}: {told} (validation_share {share:g}, by the content of each row).\n"
            "Give more rows, a file of your own as validation, or another validation_share; "
            "0 trains without validation."
        )


def _refuse_contained(
    train: Sequence[Conversation], held: Sequence[Conversation], data: Path, validation: Path
) -> None:
    if {row.id for row in held} <= {row.id for row in train}:
        raise UserError(
            f"{validation}: every one of its {len(held)} rows is also in {data}: what the model "
            "was trained on says nothing about what it has learnt. Take them out of one of the "
            "two files, or leave validation out and set rows aside by validation_share."
        )


def _read(path: Path, wanted: str) -> _Rows:
    """The rows of a file, or of all files of a folder or pattern, every one of them sound."""
    files = row_files(path)
    found: list[_Rows] = []
    problems: list[str] = []
    for file in files.paths:
        try:
            found.append(_read_file(file, wanted))
        except UserError as error:
            problems.append(str(error))
    if row_files(path).digest != files.digest:
        raise UserError(f"{path} changed while it was read; try again when nobody writes to it")
    if problems:
        raise UserError("\n".join(problems))
    if not files.hashes:
        return replace(found[0], sha256=files.digest)
    named = zip(files.hashes, found, strict=True)
    return _Rows(
        tuple(replace(row, where=f"{n}, {row.where}") for n, some in named for row in some.rows),
        ", ".join(dict.fromkeys(some.format for some in found)),
        tuple(sorted({column for some in found for column in some.ignored})),
        files.digest,
    )


def _read_file(path: Path, wanted: str) -> _Rows:
    file = open_rows(path)
    faults = FaultList()
    records = _records(file, faults)
    columns = {name for record in records for name in record.values}
    readable = any(record.fault is None for record in records)
    known = _format(columns, wanted, path, faults) if readable else None
    rows: list[Conversation] = []
    for record in records:
        if record.fault:
            faults.add_fault(record.where, record.fault)
        elif known and (row := read_conversation(record, known, faults)):
            rows.append(row)
    if not records and not faults:
        faults.add("whole file", "rows", NOTHING, "there should be at least two")
    faults.refuse(path, _LISTED)
    name, read = (known.name, known.columns) if known else ("", ())
    return _Rows(tuple(rows), name, tuple(sorted(columns.difference(read))))


def _records(file: RowFile, faults: FaultList) -> list[Record]:
    """Every row of a file; where its structure breaks, those before that."""
    records: list[Record] = []
    try:
        for record in file.records():
            records.append(record)
    except BrokenFile as broken:
        faults.add_fault(broken.where or "whole file", broken.fault)
    return records


def _format(columns: set[str], wanted: str, path: Path, faults: FaultList) -> Format | None:
    """The format that the rows are in; None when that cannot be told, which is noted."""
    if wanted != AUTO:
        if wanted not in FORMATS:
            raise UserError(
                f"format is {wanted!r}; allowed are {AUTO}, {', '.join(FORMATS)}, for {path}"
            )
        return FORMATS[wanted]
    found = recognised(columns)
    if len(found) == 1:
        return found[0]
    ways = "; ".join(f"{known.name}: {', '.join(known.needed)}" for known in FORMATS.values())
    if found:
        told = f"could be {' or '.join(known.name for known in found)}; choose with format"
    else:
        told = f"should be those of one format ({ways})"
    faults.add("whole file", "columns", sorted(columns), told)
    return None
