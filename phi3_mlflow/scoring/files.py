"""The files that are scored: JSONL, CSV and Parquet, read row by row and written with the answers.

A file is read three times (what is in it, the requests, the rows to write), never held in memory.
A row that cannot be read is a row with an error; a file whose structure cannot be trusted is
refused before any work.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Protocol

from phi3_mlflow.core.errors import UserError
from phi3_mlflow.evaluation.datasets import without_nulls
from phi3_mlflow.scoring.rows import COLUMNS, INPUT_COLUMNS, Result, Row, make_row, read_json, shown

MAX_LINE_BYTES = 16 * 1024 * 1024
"""A longer line is no row that any model could answer, and is not read into memory."""
_KEPT_TEXT = 1000  # characters of an unreadable line in the output
_BATCH = 1024  # rows of a Parquet file in memory at once

Lookup = Callable[[int], Result]


class RowFile(Protocol):
    """A file of rows in one format."""

    path: Path

    def rows(self) -> Iterator[Row]:
        """Every row, in order. Raises UserError when the file's structure is broken."""

    def check_columns(self) -> None:
        """Raises UserError when there is nothing to ask, or a column that scoring would add."""

    def write(self, out: Path, result: Lookup) -> None:
        """Write every row with its result to a new file."""


def open_rows(path: Path) -> RowFile:
    """A file by its suffix.

    Raises:
        UserError: there is no such file, or it has another suffix.
    """
    kinds: dict[str, Callable[[Path], RowFile]] = {
        ".jsonl": JsonlFile, ".ndjson": JsonlFile, ".csv": CsvFile,
        ".parquet": ParquetFile, ".pq": ParquetFile,
    }  # fmt: skip
    kind = kinds.get(path.suffix.lower())
    if kind is None:
        raise UserError(f"{path}: not a file of rows; allowed are {', '.join(kinds)}")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    return kind(path)


class JsonlFile:
    """One JSON object a line. Every row is written as it was read, byte for byte, and added to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> Iterator[Row]:
        for index, (number, line) in enumerate(self._lines()):
            values, error = _json_object(number, line)
            yield Row(index, None, error) if error else make_row(index, f"line {number}", values)

    def check_columns(self) -> None:
        seen: dict[str, None] = {}
        count = 0
        for number, line in self._lines():
            values, error = _json_object(number, line)
            count += 1
            if error:
                continue
            _refuse_taken(self.path, values, f"line {number}")
            if any(name in values for name in INPUT_COLUMNS):
                return self._check_the_rest(number)
            if len(seen) < 50:
                seen.update(dict.fromkeys(values))
        _refuse_without_input(self.path, list(seen), count)

    def _check_the_rest(self, after: int) -> None:
        for number, line in self._lines():
            if number > after:
                _refuse_taken(self.path, _json_object(number, line)[0], f"line {number}")

    def write(self, out: Path, result: Lookup) -> None:
        with out.open("wb") as file:
            for index, (number, line) in enumerate(self._lines()):
                values, error = _json_object(number, line)
                if error:
                    text = "" if line is None else line.decode("utf-8", "replace").strip()
                    values = {"line": number, "text": text[:_KEPT_TEXT]}
                    line = json.dumps(values, ensure_ascii=False).encode()
                assert line is not None
                body = line.strip().removesuffix(b"}").rstrip()
                added = json.dumps(asdict(result(index)), ensure_ascii=False).encode()
                file.write(body + (b", " if values else b"") + added[1:] + b"\n")

    def _lines(self) -> Iterator[tuple[int, bytes | None]]:
        """Lines that are not blank, with their numbers; None for one that is too long."""
        for number, line in _lines(self.path):
            if line is None or line.strip():
                yield number, line


def _json_object(number: int, line: bytes | None) -> tuple[dict[str, Any], str | None]:
    if line is None:
        return {}, f"line {number}: longer than {MAX_LINE_BYTES:,} bytes"
    try:
        values = read_json(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        return {}, f"line {number}: cannot be read as JSON: {shown_error(error)}"
    if not isinstance(values, dict):
        return {}, f"line {number}: expected an object, found {shown(values)}"
    return values, None


def shown_error(error: BaseException) -> str:
    """What a parser says; a decoding error's own text repeats the whole input."""
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 at byte {error.start}"
    return str(error)


class CsvFile:
    """Comma-separated values with a header; `messages` is JSON text in its cell."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> Iterator[Row]:
        records = self._records()
        _, names = next(records)
        for index, (number, cells) in enumerate(records):
            where = f"line {number}"
            if len(cells) != len(names):
                kept = f": {shown(cells[len(names) :])}" if len(cells) > len(names) else ""
                error = f"{where}: {len(cells)} cells where the header has {len(names)}{kept}"
                yield Row(index, None, error)
            elif not all(map(_is_text, cells)):
                yield Row(index, None, f"{where}: not UTF-8")
            else:
                yield make_row(index, where, dict(zip(names, cells, strict=True)))

    def check_columns(self) -> None:
        records = self._records()
        number, names = next(records, (1, []))
        if len(set(names)) < len(names) or not all(map(_is_text, names)):
            raise UserError(
                f"{self.path}: line {number}: the columns should be named in UTF-8 and different "
                f"from each other; found {shown(names)}"
            )
        _refuse_taken(self.path, names, f"line {number}")
        if not any(name in INPUT_COLUMNS for name in names):
            _refuse_without_input(self.path, names, 1)
        count = sum(1 for _ in records)  # to the end: the structure has to hold
        if not count:
            _refuse_without_input(self.path, names, 0)

    def write(self, out: Path, result: Lookup) -> None:
        with self.path.open("rb") as file:
            end = "\r\n" if file.readline(MAX_LINE_BYTES).endswith(b"\r\n") else "\n"
        records = self._records()
        _, names = next(records)
        with out.open("w", encoding="utf-8", newline="") as file_out:
            writer = csv.writer(file_out, lineterminator=end)
            writer.writerow([*names, *COLUMNS])
            for index, (_, cells) in enumerate(records):
                kept = [_replaced(cell) for cell in cells[: len(names)]]
                kept += [""] * (len(names) - len(kept))
                writer.writerow([*kept, *("" if v is None else v for v in result(index).values())])

    def _records(self) -> Iterator[tuple[int, list[str]]]:
        """The header and every record that is not blank, with the line it begins in."""
        csv.field_size_limit(MAX_LINE_BYTES)
        reader = csv.reader(self._text(), strict=True)
        begins = 1
        try:
            for cells in reader:
                if cells:
                    yield begins, cells
                begins = reader.line_num + 1
        except csv.Error as error:
            raise UserError(
                f"{self.path}: the record that begins in line {begins} cannot be read: {error}.\n"
                "What follows it cannot be told apart, so nothing was done. Mend the quotes there."
            ) from None

    def _text(self) -> Iterator[str]:
        for number, line in _lines(self.path):
            if line is None:
                raise UserError(
                    f"{self.path}: line {number} is longer than {MAX_LINE_BYTES:,} bytes"
                )
            yield line.decode("utf-8", "surrogateescape")


def _is_text(cell: str) -> bool:
    """Whether a cell was UTF-8: bytes that were not are kept as lone surrogates."""
    return cell.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in cell)


def _replaced(cell: str) -> str:
    if _is_text(cell):
        return cell
    return cell.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


class ParquetFile:
    """A Parquet file; its columns keep their types."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> Iterator[Row]:
        names = [name for name in INPUT_COLUMNS if name in self._schema().names]
        index = 0
        for batch in self._batches(names):
            for values in batch.to_pylist():
                row = {name: without_nulls(values[name]) for name in names}
                yield make_row(index, f"row {index + 1}", row)
                index += 1

    def check_columns(self) -> None:
        names = self._schema().names
        if len(set(names)) < len(names):
            raise UserError(f"{self.path}: a column is there twice: {shown(names)}")
        _refuse_taken(self.path, names, "the columns")
        if not any(name in INPUT_COLUMNS for name in names):
            _refuse_without_input(self.path, names, 1)
        if not sum(batch.num_rows for batch in self._batches(names)):
            _refuse_without_input(self.path, names, 0)

    def write(self, out: Path, result: Lookup) -> None:
        import pyarrow
        import pyarrow.parquet

        text, count = pyarrow.string(), pyarrow.int64()
        added = [pyarrow.field(n, count if n.endswith("tokens") else text) for n in COLUMNS]
        schema = self._schema()
        for field in added:
            schema = schema.append(field)
        index = 0
        with pyarrow.parquet.ParquetWriter(out, schema) as writer:
            for batch in self._batches(None):
                results = [result(index + at).values() for at in range(batch.num_rows)]
                index += batch.num_rows
                arrays = [
                    pyarrow.array([values[at] for values in results], field.type)
                    for at, field in enumerate(added)
                ]
                writer.write_batch(
                    pyarrow.RecordBatch.from_arrays([*batch.columns, *arrays], schema=schema)
                )

    def _schema(self) -> Any:
        with self._open() as file:
            return file.schema_arrow

    def _batches(self, names: Sequence[str] | None) -> Iterator[Any]:
        import pyarrow

        try:
            with self._open() as file:
                yield from file.iter_batches(_BATCH, columns=names)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self.path}: cannot be read as Parquet: {error}") from None

    def _open(self) -> Any:
        import pyarrow
        import pyarrow.parquet

        try:
            return pyarrow.parquet.ParquetFile(self.path)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{self.path}: cannot be read as Parquet: {error}") from None


def _lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Lines with their ends and numbers, without a byte-order mark; None for one too long."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                _skip_line(file, line)
                yield number, None
            else:
                yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _skip_line(file: IO[bytes], line: bytes) -> None:
    while line and not line.endswith(b"\n"):
        line = file.readline(MAX_LINE_BYTES)


def _refuse_taken(path: Path, names: Any, where: str) -> None:
    if taken := [name for name in COLUMNS if name in names]:
        raise UserError(
            f"{path}: {where}: has {', '.join(taken)}, which scoring adds; rename in the input"
        )


def _refuse_without_input(path: Path, names: list[str], rows: int) -> None:
    if not rows:
        raise UserError(f"{path}: holds no rows")
    raise UserError(
        f"{path}: has neither a column prompt nor messages; found: "
        f"{', '.join(map(shown, names)) or 'no readable row'}"
    )
