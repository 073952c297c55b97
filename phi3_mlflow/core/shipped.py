"""Where the files that come with the package are: the profiles and the evaluation data.

In a checkout they stand beside the package, where a person looks for them; in an installed package
they are inside it.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
"""The folder of the package `phi3_mlflow`."""

_MARK = "MLproject"  # what a checkout of the project has and a site-packages folder has not


def shipped(name: str) -> Path:
    """A folder that comes with the package.

    Args:
        name: `configs` or `data`.
    """
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent / name


def checkout() -> Path | None:
    """The checkout that this code runs from; None for an installed package."""
    root = PACKAGE.parent
    return root if (root / _MARK).is_file() else None
