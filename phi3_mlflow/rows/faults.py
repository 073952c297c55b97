"""What is wrong with a row or a file, and how it is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phi3_mlflow.core.errors import UserError, problem_list

if TYPE_CHECKING:
    from pathlib import Path

NOTHING: Any = object()
"""Stands for "there is no value to show"; None is a value."""

_SHOWN = 200  # characters of a user's own text in a message
_SHOWN_IN_LIST = 80  # and in a message among many
_MOST_LISTED = 200


def shown(value: Any, limit: int = _SHOWN) -> str:
    """A value in a message: in ASCII, and cut to so many characters."""
    text = "nothing" if value is None else ascii(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


@dataclass(frozen=True)
class Fault:
    """Why a row cannot be read.

    Attributes:
        field: what is wrong: `JSON`, `row`, `columns`, `encoding` or `length`.
        reason: what is wrong with it.
        found: what is there instead, for a list of faults; `NOTHING` to leave it out.
        sentence: the fault by itself, where that takes other words than `reason`.
    """

    field: str
    reason: str
    found: Any = NOTHING
    sentence: str = ""

    def __str__(self) -> str:
        return self.sentence or self.reason


class FaultList(list[str]):
    """What is wrong with one file, gathered so that all of it is told at once."""

    def add(self, where: str, field: str, found: Any, reason: str) -> None:
        """Note one fault.

        Args:
            where: the place in the file, as in `line 7`.
            field: the column or key.
            found: what it holds; `NOTHING` to leave that out.
            reason: what is wrong with it, or what is allowed.
        """
        value = "" if found is NOTHING else f"found {shown(found, _SHOWN_IN_LIST)}; "
        self.append(f"{where}: {field}: {value}{reason}")

    def add_fault(self, where: str, fault: Fault) -> None:
        """Note what made a row unreadable."""
        self.add(where, fault.field, fault.found, fault.reason)

    def refuse(self, source: object, most: int = _MOST_LISTED) -> None:
        """Refuse the file if anything was noted.

        Args:
            source: the file.
            most: how many faults are named; the rest is counted.

        Raises:
            UserError: naming them.
        """
        listed = self[:most]
        if len(self) > len(listed):
            listed.append(f"and {len(self) - len(listed)} more")
        if self:
            count = f"{len(self)} problem{'s' if len(self) > 1 else ''}"
            raise UserError(problem_list(f"{source}: {count}", listed))


class BrokenFile(UserError):
    """A file whose structure cannot be trusted, so that no further row of it can be read.

    Attributes:
        where: the place in the file; empty when all of it is unreadable.
        fault: what is wrong there.
    """

    def __init__(self, path: Path, where: str, fault: Fault) -> None:
        place = f"{where}: " if where and not fault.sentence else ""
        super().__init__(f"{path}: {place}{fault}")
        self.where = where
        self.fault = fault
