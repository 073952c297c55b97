"""The files that are scored: what their rows ask, and the same rows written with the answers.

A file is read several times (what is in it, the requests, the rows to write), never held in memory.
A row that cannot be read is a row with an error; a file whose structure cannot be trusted is
refused before any work.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Protocol

from phi3_mlflow.core.errors import UserError
from phi3_mlflow.rows import lines
from phi3_mlflow.rows.csv_file import CsvFile, is_text
from phi3_mlflow.rows.faults import shown
from phi3_mlflow.rows.files import FORMATS
from phi3_mlflow.rows.jsonl_file import JsonlFile
from phi3_mlflow.rows.parquet_file import ParquetFile
from phi3_mlflow.scoring.requests import COLUMNS, INPUT_COLUMNS, Result, RowRequest, request_of

if TYPE_CHECKING:
    from pathlib import Path

    from phi3_mlflow.rows.records import Record

_KEPT_TEXT = 1000  # characters of an unreadable line in the output
_SAMPLED = 50  # columns that are named when none of them asks anything

Lookup = Callable[[int], Result]
"""The result of a row, by its index."""


class ScoredFile(Protocol):
    """A file of rows in one format, to be scored.

    Attributes:
        path: where it is.
    """

    path: Path

    def requests(self) -> Iterator[RowRequest]:
        """What every row asks, in order.

        Raises:
            UserError: the file's structure is broken.
        """

    def check_columns(self) -> None:
        """See whether the file can be scored at all.

        Raises:
            UserError: there is nothing to ask, or a column that scoring would add.
        """

    def write(self, out: Path, result: Lookup) -> None:
        """Write every row with its result to a new file."""


def open_scored(path: Path) -> ScoredFile:
    """A file by its suffix.

    Raises:
        UserError: there is no such file, or it has another suffix.
    """
    reader = FORMATS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: not a file of rows; allowed are {', '.join(FORMATS)}")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    return _SCORED[reader](path)


class ScoredJsonl(JsonlFile):
    """JSONL; every row is written as it was read, byte for byte, and added to."""

    def requests(self) -> Iterator[RowRequest]:
        """What every row asks, in order."""
        for index, record in enumerate(self.records()):
            yield _request(index, record)

    def check_columns(self) -> None:
        """See whether there is anything to ask, and no key that scoring would add."""
        seen: dict[str, None] = {}
        count = 0
        asks = False
        for record in self.records():
            count += 1
            _refuse_taken(self.path, record.values, record.where)
            asks = asks or any(name in record.values for name in INPUT_COLUMNS)
            if len(seen) < _SAMPLED:
                seen.update(dict.fromkeys(record.values))
        if not asks:
            raise _without_input(self.path, list(seen), count)

    def write(self, out: Path, result: Lookup) -> None:
        """Write every row with its result; of a line that cannot be read, its beginning."""
        with out.open("wb") as file:
            for index, (number, line, record) in enumerate(self.records_with_lines()):
                if line is None or record.fault:
                    text = "" if line is None else line.decode("utf-8", "replace").strip()
                    kept = {"line": number, "text": text[:_KEPT_TEXT]}
                    line = json.dumps(kept, ensure_ascii=False).encode()
                body = line.strip().removesuffix(b"}").rstrip()
                comma = b", " if record.values or record.fault else b""
                added = json.dumps(asdict(result(index)), ensure_ascii=False).encode()
                file.write(body + comma + added[1:] + b"\n")


class ScoredCsv(CsvFile):
    """CSV; `messages` is JSON text in its cell."""

    def requests(self) -> Iterator[RowRequest]:
        """What every row asks, in order."""
        for index, record in enumerate(self.records()):
            yield _request(index, record)

    def check_columns(self) -> None:
        """See whether there is anything to ask, and no column that scoring would add."""
        number, names = self.header()
        _refuse_taken(self.path, names, f"line {number}")
        if not any(name in INPUT_COLUMNS for name in names):
            raise _without_input(self.path, names, 1)
        count = sum(1 for _ in self.records())  # to the end: the structure has to hold
        if not count:
            raise _without_input(self.path, names, 0)

    def write(self, out: Path, result: Lookup) -> None:
        """Write every row with its result, with the line ends of the input."""
        with self.path.open("rb") as file:
            end = "\r\n" if file.readline(lines.MAX_LINE_BYTES).endswith(b"\r\n") else "\n"
        _, names = self.header()
        with out.open("w", encoding="utf-8", newline="") as file_out:
            writer = csv.writer(file_out, lineterminator=end)
            writer.writerow([*names, *COLUMNS])
            for index, (cells, _) in enumerate(self.records_with_cells()):
                kept = [_replaced(cell) for cell in cells[: len(names)]]
                kept += [""] * (len(names) - len(kept))
                writer.writerow([*kept, *("" if v is None else v for v in result(index).values())])


def _replaced(cell: str) -> str:
    if is_text(cell):
        return cell
    return cell.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


class ScoredParquet(ParquetFile):
    """Parquet; the columns keep their types."""

    def requests(self) -> Iterator[RowRequest]:
        """What every row asks, in order."""
        names = [name for name in INPUT_COLUMNS if name in self.names()]
        for index, record in enumerate(self.records(names)):
            yield _request(index, record)

    def check_columns(self) -> None:
        """See whether there is anything to ask, and no column that scoring would add."""
        names = self.names()
        _refuse_taken(self.path, names, "the columns")
        if not any(name in INPUT_COLUMNS for name in names):
            raise _without_input(self.path, names, 1)
        if not sum(batch.num_rows for batch in self.batches(names)):
            raise _without_input(self.path, names, 0)

    def write(self, out: Path, result: Lookup) -> None:
        """Write every row with its result, a batch at a time."""
        import pyarrow
        import pyarrow.parquet

        text, count = pyarrow.string(), pyarrow.int64()
        added = [pyarrow.field(n, count if n.endswith("tokens") else text) for n in COLUMNS]
        schema = self.schema()
        for field in added:
            schema = schema.append(field)
        index = 0
        with pyarrow.parquet.ParquetWriter(out, schema) as writer:
            for batch in self.batches(None):
                results = [result(index + at).values() for at in range(batch.num_rows)]
                index += batch.num_rows
                arrays = [
                    pyarrow.array([values[at] for values in results], field.type)
                    for at, field in enumerate(added)
                ]
                writer.write_batch(
                    pyarrow.RecordBatch.from_arrays([*batch.columns, *arrays], schema=schema)
                )


_SCORED: dict[type, Callable[[Path], ScoredFile]] = {
    JsonlFile: ScoredJsonl,
    CsvFile: ScoredCsv,
    ParquetFile: ScoredParquet,
}


def _request(index: int, record: Record) -> RowRequest:
    if record.fault:
        return RowRequest(index, None, f"{record.where}: {record.fault}")
    return request_of(index, record.where, record.values)


def _refuse_taken(path: Path, names: Collection[str], where: str) -> None:
    if taken := [name for name in COLUMNS if name in names]:
        raise UserError(
            f"{path}: {where}: has {', '.join(taken)}, which scoring adds; rename in the input"
        )


def _without_input(path: Path, names: list[str], rows: int) -> UserError:
    if not rows:
        return UserError(f"{path}: holds no rows")
    return UserError(
        f"{path}: has neither a column prompt nor messages; found: "
        f"{', '.join(map(shown, names)) or 'no readable row'}"
    )
