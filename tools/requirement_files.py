"""Where the project's dependencies are written, read with nothing but the standard library.

``conda.yaml`` holds every direct dependency of the running project, and nothing else does;
``requirements/dev.txt``, ``gptq.txt`` and ``spark.txt`` add to it. Each has its closure beside it
as a constraints file. Setting up ``.venv`` happens before PyYAML is there, so ``conda.yaml`` is
read line by line; ``tests/project/test_environment.py`` holds this reading against YAML's.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONDA_YAML = ROOT / "conda.yaml"
REQUIREMENTS = ROOT / "requirements"

# The requirements file each set adds to conda.yaml's list, and the constraints files that bind it.
EXTRA_FILES: dict[str, str | None] = {
    "runtime": None,
    "dev": "dev.txt",
    "gptq": "gptq.txt",
    "spark": "spark.txt",
}
CONSTRAINT_FILES = {
    "runtime": ("constraints.txt",),
    "dev": ("constraints.txt", "constraints-dev.txt"),
    "gptq": ("constraints.txt", "constraints-gptq.txt"),
    "spark": ("constraints.txt", "constraints-spark.txt"),
}


def conda_pip_version(path: Path = CONDA_YAML) -> str:
    """The version of pip that conda.yaml pins, ``X`` of its line ``- pip=X``."""
    match = re.search(r"^  - pip=([\d.]+)\s*$", path.read_text(encoding="utf-8"), re.MULTILINE)
    if match is None:
        raise SystemExit(f"{path}: no line '  - pip=VERSION' under dependencies")
    return match.group(1)


def conda_pip_requirements(path: Path = CONDA_YAML) -> list[str]:
    """The requirements of conda.yaml's pip list, without its options (``-c FILE``)."""
    found = re.findall(
        r"^      - ([A-Za-z][^\s#]*)\s*(?:#.*)?$", path.read_text(encoding="utf-8"), re.MULTILINE
    )
    if not found:
        raise SystemExit(f"{path}: no pip list of lines '      - NAME==VERSION'")
    return found


def extra_requirements(path: Path) -> list[str]:
    """The requirements of a requirements file, without comments and options."""
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("-")]


def direct_requirements(kind: str) -> list[str]:
    """What a set of ``EXTRA_FILES`` asks for by name, pinned."""
    found = conda_pip_requirements()
    extra = EXTRA_FILES[kind]
    if extra is not None:
        found = found + extra_requirements(REQUIREMENTS / extra)
    return found


def constraint_paths(kind: str) -> list[Path]:
    """The constraints files that bind a set's closure."""
    return [REQUIREMENTS / name for name in CONSTRAINT_FILES[kind]]
