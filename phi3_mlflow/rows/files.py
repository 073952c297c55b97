"""Find the reader for a file of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phi3_mlflow.core.errors import UserError
from phi3_mlflow.rows.csv_file import CsvFile
from phi3_mlflow.rows.dataset_folder import DatasetFolder
from phi3_mlflow.rows.jsonl_file import JsonlFile
from phi3_mlflow.rows.parquet_file import ParquetFile

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from phi3_mlflow.rows.records import RowFile

FORMATS: Mapping[str, type[JsonlFile] | type[CsvFile] | type[ParquetFile]] = {
    ".jsonl": JsonlFile,
    ".ndjson": JsonlFile,
    ".csv": CsvFile,
    ".parquet": ParquetFile,
    ".pq": ParquetFile,
}
"""Suffix, in lower case, to the reader of one file."""


def open_rows(path: Path) -> RowFile:
    """The reader for a file, by its suffix, or for a saved dataset.

    Raises:
        UserError: there is no such file, or it is of another kind.
    """
    if DatasetFolder.is_one(path):
        return DatasetFolder(path)
    reader = FORMATS.get(path.suffix.lower())
    if reader is not None and path.is_file():
        return reader(path)
    what = "no such file" if not path.exists() else "not a dataset"
    raise UserError(
        f"{path}: {what}; allowed are .jsonl, .csv, .parquet and a directory that "
        "datasets' save_to_disk wrote"
    )
