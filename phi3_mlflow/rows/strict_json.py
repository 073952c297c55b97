"""JSON as the standard has it: no NaN, no Infinity, no key twice in one object."""

from __future__ import annotations

import json
from typing import Any, NoReturn


def no_constant(name: str) -> NoReturn:
    """For `parse_constant` of the json module: NaN and Infinity are not JSON.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"{name} is not JSON")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `object_pairs_hook` of the json module: an object, unless it names a key twice.

    Raises:
        ValueError: it does.
    """
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("an object names the same key twice")
    return row


def read_json(text: str) -> Any:
    """Read strict JSON.

    Raises:
        ValueError: it is not.
        RecursionError: it is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=unique_keys, parse_constant=no_constant)
