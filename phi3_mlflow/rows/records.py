"""One row of a file, as it was read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from phi3_mlflow.rows.faults import Fault


@dataclass(frozen=True)
class Record:
    """One row.

    Attributes:
        where: its place, as in `line 7` or `row 7`, for messages.
        values: its columns by name, without those that are not given; empty when it cannot be read.
        fault: why it cannot be read; None when it can.
    """

    where: str
    values: dict[str, Any] = field(default_factory=dict)
    fault: Fault | None = None


class RowFile(Protocol):
    """A file (or folder) of rows in one format.

    Attributes:
        path: where it is.
        kind: what it is called, as in `Parquet file`.
    """

    path: Path
    kind: str

    def records(self) -> Iterator[Record]:
        """Every row, in order, one in memory at a time where the format allows it.

        Raises:
            BrokenFile: the structure cannot be trusted from some place on.
        """


def without_nulls(value: Any) -> Any:
    """Drop the nulls that a column format fills in where a row has no such key."""
    if isinstance(value, dict):
        return {name: without_nulls(v) for name, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value
