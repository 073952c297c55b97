"""CSV: comma-separated values in UTF-8, with a header."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING

from phi3_mlflow.rows import lines
from phi3_mlflow.rows.faults import BrokenFile, Fault, shown
from phi3_mlflow.rows.records import Record

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class CsvFile:
    """Comma-separated values with a header; an empty cell is a value that is not given."""

    kind = "CSV file"

    def __init__(self, path: Path) -> None:
        self.path = path

    def records(self) -> Iterator[Record]:
        """Every row, in order.

        Raises:
            BrokenFile: the header is unusable, or a record does not end where it should.
        """
        for _, record in self.records_with_cells():
            yield record

    def records_with_cells(self) -> Iterator[tuple[list[str], Record]]:
        """Every row after its cells; bytes that are not UTF-8 are lone surrogates in these."""
        table = self._table()
        _, names = self._header(table)
        for number, cells in table:
            yield cells, _read(f"line {number}", names, cells)

    def header(self) -> tuple[int, list[str]]:
        """The number of the header's line, and its columns; none for an empty file.

        Raises:
            BrokenFile: two columns have the same name, or one is not UTF-8.
        """
        return self._header(self._table())

    def _header(self, table: Iterator[tuple[int, list[str]]]) -> tuple[int, list[str]]:
        number, names = next(table, (1, []))
        if len(set(names)) < len(names) or not all(map(is_text, names)):
            where = f"line {number}"
            told = "the columns should be named in UTF-8 and different from each other"
            sentence = f"{where}: {told}; found {shown(names)}"
            raise BrokenFile(self.path, where, Fault("columns", told, names, sentence))
        return number, names

    def _table(self) -> Iterator[tuple[int, list[str]]]:
        """The header and every record that is not blank, with the line it begins in."""
        csv.field_size_limit(lines.MAX_LINE_BYTES)
        reader = csv.reader(self._text(), strict=True)
        begins = 1
        try:
            for cells in reader:
                if cells:
                    yield begins, cells
                begins = reader.line_num + 1
        except csv.Error as error:
            told = (
                f"the record that begins in line {begins} cannot be read: {error}.\n"
                "What follows it cannot be told apart, so nothing was done. Mend the quotes there."
            )
            fault = Fault("CSV", f"cannot be read: {error}", sentence=told)
            raise BrokenFile(self.path, f"line {begins}", fault) from None

    def _text(self) -> Iterator[str]:
        for number, line in lines.numbered_lines(self.path):
            if line is None:
                told = f"longer than {lines.MAX_LINE_BYTES:,} bytes"
                fault = Fault("length", told, sentence=f"line {number} is {told}")
                raise BrokenFile(self.path, f"line {number}", fault)
            yield line.decode("utf-8", "surrogateescape")


def _read(where: str, names: list[str], cells: list[str]) -> Record:
    if len(cells) != len(names):
        told = f"{len(cells)} cells where the header has {len(names)}"
        if len(cells) < len(names):
            return Record(where, fault=Fault("columns", told))
        surplus = cells[len(names) :]
        return Record(where, fault=Fault("columns", told, surplus, f"{told}: {shown(surplus)}"))
    for name, cell in zip(names, cells, strict=True):
        if not is_text(cell):
            raw = cell.encode("utf-8", "surrogateescape")
            told = f"the column {name} should be UTF-8"
            return Record(where, fault=Fault("encoding", told, raw, "not UTF-8"))
    return Record(where, {n: cell for n, cell in zip(names, cells, strict=True) if cell})


def is_text(cell: str) -> bool:
    """Whether a cell was UTF-8: bytes that were not are kept as lone surrogates."""
    return cell.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in cell)
