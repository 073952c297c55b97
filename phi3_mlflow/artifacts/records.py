"""Outputs that live in MLflow: what a step leaves of them in the cache, as a typed record."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from pathlib import Path

RECORD_NAME = "record.json"


class Record(BaseModel):
    """Names of what a step made elsewhere, for the steps after it; written as `record.json`."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    def write(self, folder: Path) -> None:
        """Leave the record in an output's folder."""
        (folder / RECORD_NAME).write_text(self.model_dump_json(indent=2) + "\n", "utf-8")

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The record in an output's folder."""
        return cls.model_validate_json((folder / RECORD_NAME).read_bytes())
