"""Where the files that come with the package are: profiles, evaluation data, example rows.

In a checkout they stand beside the package, where a person looks for them; in an installed package
they are inside it.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
"""The folder of the package `phi3_mlflow`."""

_FOLDERS = ("configs", "data", "examples")
_PROJECT = "project:"
_MARK = "MLproject"  # what a checkout of the project has and a site-packages folder has not


def shipped(name: str) -> Path:
    """A folder that comes with the package.

    Args:
        name: `configs`, `data` or `examples`.
    """
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent / name


def project_path(path: Path) -> str | None:
    """How a file that comes with the package is named wherever the package is; None for others.

    A checkout may be a clone that is gone tomorrow, and there may be another version of it.
    """
    for name in _FOLDERS:
        folder = shipped(name).resolve()
        if path.resolve().is_relative_to(folder):
            return f"{_PROJECT}{name}/{path.resolve().relative_to(folder).as_posix()}"
    return None


def in_project(named: str, root: Path | None) -> Path:
    """The file that `project_path` has named, or any other path as it is.

    Args:
        named: what it gave, or a path.
        root: the checkout to find it in; None for the package that runs.
    """
    if not named.startswith(_PROJECT):
        return Path(named)
    folder, _, rest = named.removeprefix(_PROJECT).partition("/")
    return (shipped(folder) if root is None else root / folder) / rest


def checkout() -> Path | None:
    """The checkout that this code runs from; None for an installed package."""
    root = PACKAGE.parent
    return root if (root / _MARK).is_file() else None
