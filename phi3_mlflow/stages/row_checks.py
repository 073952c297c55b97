"""Checks that come with training rows: faults found before any work, told by file and line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phi3_mlflow.core.errors import UserError
from phi3_mlflow.rows.faults import NOTHING, FaultList

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from phi3_mlflow.training.conversations import Conversation

_LISTED = 20


def refuse_faulty_checks(files: Mapping[str, Sequence[Conversation]]) -> None:
    """Hold what the rows have in the column `check` against what a check may be.

    Args:
        files: the rows of each file, by its name.

    Raises:
        UserError: names every check that is not one by file, line and field.
    """
    from pydantic import TypeAdapter, ValidationError

    from phi3_mlflow.evaluation.checks import Check

    known: TypeAdapter[Check] = TypeAdapter(Check)
    problems = []
    for file, rows in files.items():
        faults = FaultList()
        for row in sorted(rows, key=_place):
            if row.check is None:
                continue
            try:
                known.validate_python(row.check)
            except ValidationError as error:
                for fault in error.errors(include_url=False, include_context=False):
                    name = ".".join(map(str, ("check", *fault["loc"])))
                    value = NOTHING if fault["type"] == "missing" else fault["input"]
                    faults.add(row.where, name, value, fault["msg"].removeprefix("Value error, "))
        try:
            faults.refuse(file, _LISTED)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))


def _place(row: Conversation) -> tuple[str, int]:
    """What puts rows back into the order of their file; a place ends with a number."""
    before, _, number = row.where.rpartition(" ")
    return before, int(number)
