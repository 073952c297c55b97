"""Reports as metrics."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def numbers(report: DataclassInstance) -> dict[str, float]:
    """The numbers in a dataclass, as metrics; wall time is left to the run's own."""
    values = {item.name: getattr(report, item.name) for item in fields(report)}
    return {
        name: float(value)
        for name, value in values.items()
        if name != "seconds" and isinstance(value, int | float) and not isinstance(value, bool)
    }
