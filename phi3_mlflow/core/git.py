"""Asking git, without its ever asking back."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from typing import TYPE_CHECKING

from phi3_mlflow.core.shipped import checkout

if TYPE_CHECKING:
    from pathlib import Path

UNKNOWN = "unknown"
DIRTY = "-dirty"
_SECONDS = 300
_HIDDEN = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")


def git(folder: Path, *arguments: str) -> str | None:
    """What git prints in a folder, or None when it fails; it never asks for a password."""
    environment = {k: v for k, v in os.environ.items() if k not in _HIDDEN}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            env={**environment, "GIT_TERMINAL_PROMPT": "0"},
            capture_output=True, text=True, check=True, timeout=_SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


@dataclass(frozen=True)
class Origin:
    """The code that runs.

    Attributes:
        commit: its commit, `-dirty` appended when the checkout differs from it, or `unknown`.
        url: where the repository of an installed package was cloned from.
    """

    commit: str
    url: str | None = None


def origin() -> Origin:
    """The commit of the code that runs: of the checkout, or of what pip installed from git."""
    root = checkout()
    if root is None:
        return _installed()
    commit = git(root, "rev-parse", "HEAD")
    if commit is None:
        return Origin(UNKNOWN)
    dirty = git(root, "status", "--porcelain", "--untracked-files=no")
    return Origin(f"{commit}{DIRTY}" if dirty else commit, git(root, "remote", "get-url", "origin"))


def _installed() -> Origin:
    """What pip wrote down when it installed the package (PEP 610)."""
    try:
        text = distribution("phi3-mlflow").read_text("direct_url.json")
    except PackageNotFoundError:
        return Origin(UNKNOWN)
    try:
        about = json.loads(text or "{}")
        return Origin(about["vcs_info"]["commit_id"], about["url"])
    except (ValueError, KeyError, TypeError):
        return Origin(UNKNOWN)
