"""A folder that `datasets.Dataset.save_to_disk` wrote."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phi3_mlflow.core.errors import UserError
from phi3_mlflow.rows.faults import BrokenFile, Fault
from phi3_mlflow.rows.records import Record, without_nulls

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_DATASET, _SEVERAL = "state.json", "dataset_dict.json"


class DatasetFolder:
    """A saved dataset of one split."""

    kind = "saved dataset"

    def __init__(self, path: Path) -> None:
        self.path = path

    @staticmethod
    def is_one(path: Path) -> bool:
        """Whether a folder looks like a saved dataset, of one split or of several."""
        return path.is_dir() and any((path / name).exists() for name in (_DATASET, _SEVERAL))

    def records(self) -> Iterator[Record]:
        """Every row, in order.

        Raises:
            UserError: it holds several splits.
            BrokenFile: it cannot be read.
        """
        import datasets

        if (self.path / _SEVERAL).exists():
            splits = sorted(found.parent.name for found in self.path.glob(f"*/{_DATASET}"))
            raise UserError(
                f"{self.path}: holds several splits; give one: {', '.join(splits) or 'none'}"
            )
        try:
            rows = datasets.load_from_disk(str(self.path)).to_list()
        except Exception as error:  # the library raises whatever the broken file provokes
            raise BrokenFile(self.path, "", Fault("dataset", str(error))) from None
        for number, row in enumerate(rows, start=1):
            yield Record(f"row {number}", without_nulls(row))
