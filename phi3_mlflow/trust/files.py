"""The files of a model's folder as a signature covers them: all but two, and nothing odd."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from phi3_mlflow.artifacts.manifests import sha256_of_file
from phi3_mlflow.tracking.stored_files import ADDED

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ATTESTATIONS = "attestations"
"""The folder beside a model's files with what was signed about them; it cannot sign itself."""
IGNORED = (ATTESTATIONS, ADDED)
"""What a signature leaves out. MLflow writes the second, name and number of the version that was
asked for, into the folder at each download, and reads it nowhere."""


@dataclass(frozen=True)
class ModelFiles:
    """A model's folder, read once.

    Attributes:
        hashes: sha256 as hex by POSIX path, of every file that a signature covers.
        sizes: bytes by path.
        odd: what no model of this project has: symbolic links, devices, unreadable files; a
            phrase each.
    """

    hashes: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    odd: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> ModelFiles:
        """Hash a folder's files."""
        found = cls()
        for path, file in _entries(folder):
            if file.is_symlink():
                found.odd.append(f"{path} is a symbolic link")
            elif not file.is_file():
                found.odd.append(f"{path} is not a plain file")
            else:
                try:
                    found.sizes[path] = file.stat().st_size
                    found.hashes[path] = sha256_of_file(file)
                except OSError as error:
                    found.odd.append(f"{path} cannot be read: {error.strerror or error}")
        return found

    @property
    def root(self) -> str:
        """The digest over all files by which OpenSSF Model Signing names a model."""
        digest = hashlib.sha256()
        for path in sorted(self.hashes, key=PurePosixPath):
            digest.update(bytes.fromhex(self.hashes[path]))
        return digest.hexdigest()

    def differences(self, expected: Mapping[str, str]) -> list[str]:
        """What differs from hashes that were signed or written down, a phrase per file."""
        missing = sorted(expected.keys() - self.hashes.keys())
        added = sorted(self.hashes.keys() - expected.keys())
        gone = {expected[path]: path for path in missing}
        moved = {gone[self.hashes[path]]: path for path in added if self.hashes[path] in gone}
        told = [f"{before} is now called {after}" for before, after in sorted(moved.items())]
        told += [f"{path} is missing" for path in missing if path not in moved]
        told += [_added(path) for path in added if path not in moved.values()]
        told += [
            f"{path} has other bytes"
            for path in sorted(expected.keys() & self.hashes.keys())
            if expected[path] != self.hashes[path]
        ]
        return told + self.odd


def _added(path: str) -> str:
    if "__pycache__" in path.split("/"):
        return (
            f"{path} was added: byte code that Python would run in place of the signed source "
            "(whoever loads a model from this folder leaves it; delete the folder __pycache__)"
        )
    return f"{path} was added"


def _entries(folder: Path) -> Iterator[tuple[str, Path]]:
    """Everything below a folder that is no plain folder, what is ignored left out."""
    for root, folders, files in os.walk(folder):
        here = Path(root)
        top = here == folder
        # `os.walk` lists a link to a folder among the folders, and does not follow it.
        links = [name for name in folders if (here / name).is_symlink()]
        folders[:] = sorted(
            name for name in folders if name not in links and not (top and name == ATTESTATIONS)
        )
        for name in sorted([*files, *links]):
            file = here / name
            if top and name == ADDED and file.is_file() and not file.is_symlink():
                continue
            yield file.relative_to(folder).as_posix(), file
