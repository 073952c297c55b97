"""How a process ended, in words."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from multiprocessing.process import BaseProcess

_JOINED_S = 5.0  # a process that is gone is joined at once


def ending(code: int | None) -> str:
    """What an exit code tells; memory is blamed where the system killed the process, only there.

    Args:
        code: as `multiprocessing` has it: the negative number of a signal, or what was returned.
    """
    if code is None:
        return "ended without a word"
    if code == -signal.SIGKILL:
        return "was killed (SIGKILL); the usual reason is too little memory"
    if code < 0:
        try:
            return f"was ended by {signal.Signals(-code).name}"
        except ValueError:
            return f"was ended by signal {-code}"
    return f"ended with code {code}"


def code_of(processes: Sequence[BaseProcess]) -> int | None:
    """The exit code of the first of some processes that are gone."""
    for process in processes:
        process.join(timeout=_JOINED_S)
    return next((process.exitcode for process in processes), None)


def ending_of(processes: Sequence[BaseProcess]) -> str:
    """How the first of some processes ended, in words."""
    return ending(code_of(processes))
