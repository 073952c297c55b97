"""What a person reads while a step works: remarks on standard error.

Standard output stays what a script may read.
"""

from __future__ import annotations

import sys

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
