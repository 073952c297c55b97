"""What can go wrong for a reason that a person can mend, and the exit code that tells it apart.

A `ProjectError` reaches the user as one message without a traceback; anything else is a fault of
the project and keeps its traceback.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

EXIT_DONE = 0
EXIT_FAULT = 1
EXIT_BAD_INPUT = 2
EXIT_GATE = 3
EXIT_DIFFERENT = 4


_OUTCOMES = {
    EXIT_DONE: "done",
    EXIT_BAD_INPUT: "bad_input",
    EXIT_GATE: "refused",
    EXIT_DIFFERENT: "different",
}


def outcome_of(code: object) -> str:
    """What an exit code means, in a word."""
    if not isinstance(code, int):
        return "failed"
    return "stopped" if code > 128 else _OUTCOMES.get(code, "failed")


class ProjectError(Exception):
    """An expected failure: the message says what is wrong, where, and what to do.

    Attributes:
        exit_code: what the process ends with.
    """

    exit_code: int = EXIT_FAULT


class UserError(ProjectError):
    """Bad input: a parameter, a profile, a file or a checkpoint that is refused."""

    exit_code = EXIT_BAD_INPUT


class CheckpointRefused(UserError):
    """A checkpoint that must not be loaded: remote code, pickles, lying headers, wrong shapes."""


class VersionRefused(UserError):
    """A version that the profile's policy does not let through; nothing of it was loaded."""


class GateRefused(ProjectError):
    """The evaluation gate said no; nothing is broken, and the alias stays where it was."""

    exit_code = EXIT_GATE


class TooManyFailed(ProjectError):
    """More rows of a scored file failed than were allowed; the output is there."""

    exit_code = EXIT_GATE


class NotReproduced(ProjectError):
    """A version that was made again came out with other bytes; nothing was changed."""

    exit_code = EXIT_DIFFERENT


class NotVerified(ProjectError):
    """A version, or a folder with one, is not what was signed, logged or registered."""

    exit_code = EXIT_DIFFERENT


class StepFailed(ProjectError):
    """A step that `main` ran ended badly; it has said why itself."""

    def __init__(self, step: str, exit_code: int) -> None:
        super().__init__(f"step {step} ended with code {exit_code}; see its message above")
        self.exit_code = exit_code


class EnvironmentProblem(ProjectError):
    """The machine or a service is not in a state to do the work: no memory, no disk, no network."""


def problem_list(headline: str, problems: Sequence[str], way_out: str = "") -> str:
    """Lay out every problem of one input as a single message.

    Args:
        headline: what was looked at, without a trailing colon.
        problems: one line (or several) a problem.
        way_out: what to do about it, or nothing.

    Returns:
        The headline, the problems as a list, and the way out, as text.
    """
    lines = [f"{headline}:"]
    for problem in problems:
        first, *rest = problem.splitlines() or [""]
        lines.append(f"  - {first}")
        lines.extend(f"    {line}" for line in rest)
    if way_out:
        lines.append(way_out)
    return "\n".join(lines)
