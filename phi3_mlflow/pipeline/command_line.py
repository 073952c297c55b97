"""The command line of a step: its options, its exit code, its errors."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, NoReturn

import click

from phi3_mlflow.artifacts.cache import is_full_disk
from phi3_mlflow.config.parameters import PARAMETERS, Request, read_request
from phi3_mlflow.core import console
from phi3_mlflow.core.errors import (
    EXIT_BAD_INPUT,
    EXIT_DIFFERENT,
    EXIT_DONE,
    EXIT_FAULT,
    EXIT_GATE,
    ProjectError,
)
from phi3_mlflow.pipeline.step import Step, carry_out
from phi3_mlflow.tracking.runs import summary_line


def command(
    name: str,
    parameters: tuple[str, ...],
    manual: str | None,
    do: Callable[[Request], object],
    choices: Mapping[str, tuple[str, ...]] | None = None,
) -> click.Command:
    """A click command whose options are a step's parameters.

    Args:
        name: the step's name.
        parameters: the names it takes.
        manual: the script's docstring.
        do: is called with the checked request.
        choices: allowed values that depend on the step.
    """

    def callback(**values: str) -> None:
        sys.exit(guarded(name, lambda: do(read_request(parameters, values, choices))))

    options = [
        click.Option(
            [PARAMETERS[parameter].option],
            default=PARAMETERS[parameter].default,
            show_default=True,
            metavar="TEXT",
            help=PARAMETERS[parameter].help,
        )
        for parameter in parameters
    ]
    help_text = "\b\n" + (manual or "").strip().replace("\n\n", "\n\n\b\n")
    return _Command(name, callback=callback, params=list(options), help=help_text)


class _Command(click.Command):
    """Leaves a summary line when the command line itself is wrong, too."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.UsageError:
            _summarize(str(self.name), EXIT_BAD_INPUT)
            raise


def step_command(step: Step, manual: str | None) -> click.Command:
    """The command line of one step."""
    choices = {"force": ("true", "false")}
    return command(
        step.name, step.all_parameters, manual, lambda request: _carry_out(step, request), choices
    )


def _carry_out(step: Step, request: Request) -> None:
    console.set_quiet(request.flag("quiet"))
    carry_out(step, request)


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


_STATUS = {EXIT_BAD_INPUT: "bad_input", EXIT_GATE: "refused", EXIT_DIFFERENT: "different"}


def _summarize(name: str, code: object) -> None:
    stopped = isinstance(code, int) and code > 128
    status = "stopped" if stopped else _STATUS.get(code, "failed")  # type: ignore[call-overload]
    print(summary_line(step=name, status=status, code=code), flush=True)


def _stop_on_terminate() -> None:
    """Let SIGTERM unwind the stack, so that unfinished output is removed and the run closed."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    if sys.platform != "win32":
        signal.signal(signal.SIGTERM, stop)


def run_script(step: Step, manual: str | None) -> Any:
    """What a step's script does when it is run: parse the command line and go."""
    return step_command(step, manual).main(prog_name=f"python -m steps.{step.name}")
