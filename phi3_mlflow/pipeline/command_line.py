"""The command line of an entry point: its options, its exit code, its errors."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING, NoReturn

import click

from phi3_mlflow.artifacts.cache import is_full_disk
from phi3_mlflow.config.parameters import PARAMETERS, read_request
from phi3_mlflow.core import console
from phi3_mlflow.core.console import summary_line
from phi3_mlflow.core.errors import (
    EXIT_BAD_INPUT,
    EXIT_DONE,
    EXIT_FAULT,
    ProjectError,
    outcome_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import FrameType

    from phi3_mlflow.pipeline.command import Command


def click_command(command: Command) -> click.Command:
    """A click command whose options are an entry point's parameters."""

    def callback(**values: str) -> None:
        sys.exit(guarded(command.name, lambda: _run(command, values)))

    options = [
        click.Option(
            [PARAMETERS[parameter].option],
            default=PARAMETERS[parameter].default,
            show_default=True,
            metavar="TEXT",
            help=PARAMETERS[parameter].help,
        )
        for parameter in command.parameters
    ]
    help_text = "\b\n" + command.manual.replace("\n\n", "\n\n\b\n")
    return _Command(command.name, callback=callback, params=list(options), help=help_text)


def _run(command: Command, values: Mapping[str, str]) -> None:
    request = read_request(command.parameters, values, command.choices)
    console.set_quiet(request.flag("quiet"))
    command.run(request)


def run_script(command: Command) -> None:
    """What a script in `steps/` does: parse the command line and go."""
    click_command(command).main(prog_name=f"python -m steps.{command.name}")


class _Command(click.Command):
    """Leaves a summary line when the command line itself is wrong, too."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.UsageError:
            _summarize(str(self.name), EXIT_BAD_INPUT)
            raise


def guarded(name: str, do: Callable[[], object]) -> int:
    """Do something and turn what goes wrong into a message and an exit code.

    Whatever ends badly leaves a summary line, too, for log collectors.

    Args:
        name: the step's.
        do: does it, and says itself when it has ended well.

    Returns:
        0 done, 2 bad input, 3 the gate said no, 4 not the same when made again, 1 the rest;
        128 + n after signal n.
    """
    _stop_on_terminate()
    try:
        code = _coded(do)
    except SystemExit as stopped:
        _summarize(name, stopped.code)
        raise
    except BaseException:
        _summarize(name, EXIT_FAULT)
        raise
    if code != EXIT_DONE:
        _summarize(name, code)
    return code


def _coded(do: Callable[[], object]) -> int:
    try:
        do()
    except ProjectError as error:
        _complain(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        _complain("stopped")
        return 128 + signal.SIGINT
    except MemoryError:
        _complain("error: not enough memory. Close other programs, or take a smaller profile.")
        return EXIT_FAULT
    except Exception as error:
        if not is_full_disk(error):
            raise
        _complain(
            "error: no space left on a disk: look at the cache (PHI3_MLFLOW_CACHE), at MLflow's "
            "database and artifacts, and at the folder for temporary files (TMPDIR)."
        )
        return EXIT_FAULT
    return EXIT_DONE


def _complain(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _summarize(name: str, code: object) -> None:
    print(summary_line(step=name, status=outcome_of(code), code=code), flush=True)


def _stop_on_terminate() -> None:
    """Let SIGTERM unwind the stack, so that unfinished output is removed and the run closed."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    if sys.platform != "win32":
        signal.signal(signal.SIGTERM, stop)
