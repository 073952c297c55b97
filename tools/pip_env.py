"""Run a command with pip's configuration in the variables uv reads.

uv knows nothing of pip.conf and the PIP_* variables: where packages come from a mirror or from
wheels in a directory (``find-links``, say a CPU build of torch), ``mlflow run --env-manager uv``
would go elsewhere. ::

    python tools/pip_env.py mlflow run . --env-manager uv -P profile=smollm2-135m
    python tools/pip_env.py                 # the names of the variables it would set

What is in the environment already wins. The project itself does not need this: it is for machines
where pip is configured and uv is not. Values are not printed, since an index's address may hold a
password.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Mapping

# pip reads these sections in this order, the later winning.
_SECTIONS = ("global", "install", ":env:")


def pip_configuration(python: str = sys.executable) -> dict[str, str]:
    """pip's effective options for ``pip install``, from its files and the environment."""
    shown = subprocess.run(
        [python, "-m", "pip", "config", "list"],
        capture_output=True,
        text=True,
        check=True,
        stdin=subprocess.DEVNULL,
    )
    return parse_pip_config(shown.stdout)


def parse_pip_config(text: str) -> dict[str, str]:
    """The options in the output of ``pip config list``: lines ``SECTION.OPTION='VALUE'``."""
    found: dict[str, tuple[int, str]] = {}
    for line in text.splitlines():
        key, separator, literal = line.partition("=")
        section, dot, option = key.partition(".")
        if not separator or not dot or section not in _SECTIONS:
            continue
        try:
            value = ast.literal_eval(literal)
        except (SyntaxError, ValueError):
            value = literal
        rank = _SECTIONS.index(section)
        if option not in found or rank >= found[option][0]:
            found[option] = (rank, str(value))
    return {option: value for option, (_, value) in found.items()}


def uv_variables(
    configuration: Mapping[str, str], environment: Mapping[str, str]
) -> dict[str, str]:
    """The variables to add to ``environment`` so that uv looks where pip looks."""
    wanted: dict[str, str] = {}
    if links := configuration.get("find-links", "").split():
        wanted["UV_FIND_LINKS"] = ",".join(links)
    if index := configuration.get("index-url", "").strip():
        wanted["UV_DEFAULT_INDEX"] = index
    if extra := configuration.get("extra-index-url", "").split():
        wanted["UV_INDEX"] = " ".join(extra)
        # uv stops at the first index that knows a name; pip takes the best of all of them.
        wanted["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    if certificates := configuration.get("cert", "").strip():
        wanted["SSL_CERT_FILE"] = certificates
    if configuration.get("no-index", "").strip().lower() in ("1", "true", "yes", "on"):
        wanted["UV_NO_INDEX"] = "1"
    return {name: value for name, value in wanted.items() if name not in environment}


def main(arguments: list[str]) -> int:
    added = uv_variables(pip_configuration(), os.environ)
    if not arguments:
        print("\n".join(added) if added else "pip's configuration holds nothing that uv needs")
        return 0
    if arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    try:
        os.execvpe(arguments[0], arguments, {**os.environ, **added})
    except OSError as error:
        print(f"cannot run {arguments[0]}: {error.strerror}", file=sys.stderr)
        return 127


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
