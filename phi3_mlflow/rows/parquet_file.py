"""Parquet, a batch of rows in memory at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phi3_mlflow.rows.faults import BrokenFile, Fault, shown
from phi3_mlflow.rows.records import Record, without_nulls

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import pyarrow

_BATCH = 1024  # rows


class ParquetFile:
    """A Parquet file; a null is a value that is not given."""

    kind = "Parquet file"

    def __init__(self, path: Path) -> None:
        self.path = path

    def records(self, columns: Sequence[str] | None = None) -> Iterator[Record]:
        """Every row, in order.

        Args:
            columns: those to read; default: all.

        Raises:
            BrokenFile: the file cannot be read as Parquet, or has a column twice.
        """
        self.names()
        number = 0
        for batch in self.batches(columns):
            for values in self._python(batch):
                number += 1
                yield Record(f"row {number}", without_nulls(values))

    def names(self) -> list[str]:
        """The columns.

        Raises:
            BrokenFile: one is there twice.
        """
        names = list(self.schema().names)
        if len(set(names)) < len(names):
            fault = Fault("columns", f"a column is there twice: {shown(names)}")
            raise BrokenFile(self.path, "", fault)
        return names

    def schema(self) -> pyarrow.Schema:
        """Columns and their types."""
        with self._open() as file:
            return file.schema_arrow

    def batches(self, columns: Sequence[str] | None) -> Iterator[pyarrow.RecordBatch]:
        """The rows as Arrow has them, some at a time."""
        import pyarrow

        try:
            with self._open() as file:
                yield from file.iter_batches(_BATCH, columns=columns)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise self._broken(error) from None

    def _python(self, batch: pyarrow.RecordBatch) -> list[dict[str, object]]:
        import pyarrow

        try:
            rows: list[dict[str, object]] = batch.to_pylist()
        except (pyarrow.ArrowException, ValueError, OverflowError) as error:
            raise self._broken(error) from None
        return rows

    def _open(self) -> pyarrow.parquet.ParquetFile:
        import pyarrow
        import pyarrow.parquet

        try:
            return pyarrow.parquet.ParquetFile(self.path)
        except (pyarrow.ArrowException, OSError) as error:
            raise self._broken(error) from None

    def _broken(self, error: Exception) -> BrokenFile:
        told = f"cannot be read as Parquet: {error}"
        return BrokenFile(self.path, "", Fault("Parquet", str(error), sentence=told))
