"""Write a first profile for a model of your own, with the choices there are as comments.

    phi3-mlflow init --source hf:OWNER/NAME@main --output my-model.yaml
    python -m steps.init --source file:/path/to/model --questions my-questions.csv
    mlflow run . --env-manager local -e init -P source=file:/a/model -P output=/a/mine.yaml

The model's config.json and the head of its README.md are read, on the hub or in the folder: what
they say is filled in (context, sizes, licence), a branch is pinned to its commit, and a model that
cannot be used is refused here. Without `source` it is a profile for Phi-3-mini-4k to change. The
name of the file becomes the model's name in the registry. A file that is there is never
overwritten.
"""

from __future__ import annotations

import re
import shlex
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from phi3_mlflow.config.loading import load_profile
from phi3_mlflow.config.starter import EXAMPLE_SOURCE, example, starter
from phi3_mlflow.core import console
from phi3_mlflow.core.console import summary_line
from phi3_mlflow.core.errors import UserError, problem_list
from phi3_mlflow.core.hints import run_command
from phi3_mlflow.core.shipped import checkout
from phi3_mlflow.pipeline.command import Command
from phi3_mlflow.rows.location import is_uri
from phi3_mlflow.sources.about import look_at
from phi3_mlflow.sources.spec import parse_source

if TYPE_CHECKING:
    from phi3_mlflow.config.parameters import Request

_DEFAULT = "my-model.yaml"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.ya?ml")


class Init(Command):
    """Writing a first profile."""

    name = "init"
    parameters = ("output", "source", "data", "questions", "quiet")

    def run(self, request: Request) -> None:
        file = target(request)
        given = {name: given_path(request, name) for name in ("data", "questions")}
        source = EXAMPLE_SOURCE if request.is_auto("source") else request.value("source").strip()
        # The example is known; asking the hub for it would only need a network.
        known = source == EXAMPLE_SOURCE
        about = example() if known else look_at(parse_source(source), Path.cwd())
        text = starter(about, source=source, **given)
        write_checked(file, text)
        console.say(f"Written: {file}\n{next_commands(file)}")
        print(summary_line(step="init", status="done", profile=file), flush=True)


def target(request: Request) -> Path:
    """The file to write.

    Raises:
        UserError: it is there, its folder is not, or its name is not one for a profile.
    """
    named = _DEFAULT if request.is_auto("output") else request.value("output")
    file = Path(named).expanduser().absolute()
    problems = []
    if not _NAME.fullmatch(file.name):
        problems.append(
            f"parameter: output = {named!r}: a profile is called NAME.yaml, with letters, digits, "
            ". _ - in NAME, which becomes the model's name in the registry"
        )
    if file.exists() or file.is_symlink():
        problems.append(f"parameter: output: {file} is there, and is not overwritten")
    elif not file.parent.is_dir():
        problems.append(f"parameter: output: there is no folder {file.parent}")
    if problems:
        raise UserError(problem_list("No profile was written", problems))
    return file


def given_path(request: Request, name: str) -> str | None:
    """Rows or questions as the profile is to name them: URIs as they are, files absolute.

    Raises:
        UserError: there is no such file.
    """
    if request.is_auto(name):
        return None
    value = request.value(name)
    if is_uri(value):
        return value
    path = Path(value).expanduser().absolute()
    if not path.exists() and not any(path.parent.glob(path.name)):
        raise UserError(f"parameter: {name} = {value!r}: there is no file {path}")
    return str(path)


def write_checked(file: Path, text: str) -> None:
    """Write a profile that can be loaded, or nothing.

    Raises:
        UserError: it cannot be loaded, or somebody else has written the file meanwhile.
    """
    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder) / file.name
        trial.write_text(text, encoding="utf-8")
        load_profile(str(trial))
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError as error:
        raise UserError(f"{file} is there, and is not overwritten") from error
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}") from error


def next_commands(file: Path) -> str:
    """What to do with a profile, in the words of this installation."""
    if checkout() is None:
        run = shlex.join(["phi3-mlflow", "main", "--profile", str(file)])
        preview = f"{run} --dry-run true"
    else:
        run = run_command(profile=str(file))
        preview = run_command(profile=str(file), dry_run="true")
    return f"Next\n  what it would do:  {preview}\n  do it:             {run}"


COMMAND = Init()
