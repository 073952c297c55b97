"""What a person reads while a step works: remarks on standard error.

Standard output stays what a script may read.
"""

from __future__ import annotations

import json
import sys
from typing import Any

_quiet = False


def set_quiet(quiet: bool) -> None:
    """Leave out progress and remarks from now on; errors and the summary line stay."""
    global _quiet
    _quiet = quiet


def is_quiet() -> bool:
    """Whether progress and remarks are left out."""
    return _quiet


def say(message: str) -> None:
    """One remark to the person watching."""
    if not _quiet:
        print(message, file=sys.stderr, flush=True)


def summary_line(**fields: Any) -> str:
    """One line in logfmt for log collectors."""

    def quote(value: Any) -> str:
        text = str(value).lower() if isinstance(value, bool) else str(value)
        plain = text and not any(c.isspace() or c in '"=' for c in text)
        return text if plain else json.dumps(text, ensure_ascii=False)

    return " ".join(f"{name}={quote(value)}" for name, value in fields.items())
