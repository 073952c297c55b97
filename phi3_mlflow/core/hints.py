"""Commands for a person to copy, as they work on this machine.

`mlflow run` makes an environment with conda unless it is told otherwise, and fails where there is
none. Whoever reads a hint of a step has an environment already: the one that the step runs in.
"""

from __future__ import annotations

import shlex
import shutil


def env_manager() -> str:
    """The option of `mlflow run` that fits this machine; empty where its default does."""
    return "" if shutil.which("conda") else "--env-manager local"


def run_command(step: str | None = None, **parameters: str) -> str:
    """`mlflow run` of the project's step, None for `main`, with parameters."""
    words = ["mlflow", "run", ".", *(["-e", step] if step else [])]
    for name, value in parameters.items():
        words += ["-P", f"{name}={value}"]
    return shlex.join([*words, *env_manager().split()])
