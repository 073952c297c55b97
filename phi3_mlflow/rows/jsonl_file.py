"""JSONL: one JSON object per line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phi3_mlflow.rows import lines
from phi3_mlflow.rows.faults import Fault, shown
from phi3_mlflow.rows.records import Record
from phi3_mlflow.rows.strict_json import read_json

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class JsonlFile:
    """One JSON object per line; blank lines do not count."""

    kind = "JSONL file"

    def __init__(self, path: Path) -> None:
        self.path = path

    def records(self) -> Iterator[Record]:
        """Every row, in order."""
        for _, _, record in self.records_with_lines():
            yield record

    def records_with_lines(self) -> Iterator[tuple[int, bytes | None, Record]]:
        """Every row after the number and the bytes of its line; None for one that is too long."""
        for number, line in lines.numbered_lines(self.path):
            if line is None or line.strip():
                yield number, line, _read(f"line {number}", line)


def _read(where: str, line: bytes | None) -> Record:
    if line is None:
        return Record(where, fault=Fault("length", f"longer than {lines.MAX_LINE_BYTES:,} bytes"))
    try:
        values = read_json(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        reason = f"cannot be read as JSON: {_told(error)}"
        return Record(where, fault=Fault("JSON", reason, line.decode("utf-8", "replace"), reason))
    if not isinstance(values, dict):
        told = f"expected an object, found {shown(values)}"
        fault = Fault("row", "should be an object with named fields", values, told)
        return Record(where, fault=fault)
    return Record(where, values)


def _told(error: BaseException) -> str:
    """What a parser says; a decoding error's own text repeats the whole input."""
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 at byte {error.start}"
    return str(error)
