"""The program `phi3-mlflow`: every entry point as a subcommand. `phi3-mlflow STEP --help`."""

from __future__ import annotations

import click

from phi3_mlflow import __version__
from phi3_mlflow.pipeline.command_line import click_command
from phi3_mlflow.stages.catalog import COMMANDS

PROGRAM = "phi3-mlflow"


@click.group(
    PROGRAM,
    commands={name: click_command(command) for name, command in COMMANDS.items()},
    help="Take a Phi-3 model from its source to production with MLflow.",
)
@click.version_option(__version__, prog_name=PROGRAM)
def main() -> None:
    """Hand over to a subcommand."""


if __name__ == "__main__":
    main(prog_name=PROGRAM)
