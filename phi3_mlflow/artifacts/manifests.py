"""What a directory holds, file by file: the identity of every step's output.

A manifest is a JSON file `manifest.json` next to the files that it lists; it lists neither itself
nor anything outside the directory. Its digest is the identity of the content and is what the next
step's cache key is made of.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from phi3_mlflow.core.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MANIFEST_NAME = "manifest.json"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class FileEntry:
    """One file: its POSIX path inside the directory, its size in bytes, its sha256 as hex."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The files of a directory, sorted by path."""

    files: tuple[FileEntry, ...]

    @property
    def digest(self) -> str:
        """sha256 over paths, sizes and content hashes: equal exactly when the content is."""
        lines = "".join(f"{f.path}\0{f.size}\0{f.sha256}\n" for f in self.files)
        return hashlib.sha256(lines.encode()).hexdigest()

    @property
    def total_bytes(self) -> int:
        """The size of all files together."""
        return sum(f.size for f in self.files)

    def sha256_of(self, path: str) -> str | None:
        """The hash of one file, or None when the manifest has no such file."""
        return next((f.sha256 for f in self.files if f.path == path), None)

    def to_json(self) -> str:
        """The text of `manifest.json`."""
        files = [{"path": f.path, "size": f.size, "sha256": f.sha256} for f in self.files]
        content = {"digest": self.digest, "total_bytes": self.total_bytes, "files": files}
        return json.dumps(content, indent=2) + "\n"

    @classmethod
    def of_directory(cls, directory: Path) -> Manifest:
        """Hash every file below a directory (the manifest itself left out)."""
        return cls(
            tuple(
                FileEntry(
                    file.relative_to(directory).as_posix(),
                    file.stat().st_size,
                    sha256_of_file(file),
                )
                for file in walk_files(directory)
            )
        )

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read the manifest of a directory.

        Raises:
            UserError: there is none, or it cannot be parsed.
        """
        file = directory / MANIFEST_NAME
        try:
            content = json.loads(file.read_text("utf-8"))
            files = tuple(FileEntry(f["path"], f["size"], f["sha256"]) for f in content["files"])
        except FileNotFoundError as error:
            raise UserError(f"{directory} has no {MANIFEST_NAME}") from error
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise UserError(f"{file} is not a manifest: {error}") from error
        return cls(files)

    def write(self, directory: Path) -> None:
        """Write `manifest.json` into a directory."""
        (directory / MANIFEST_NAME).write_text(self.to_json(), "utf-8")

    def differences(self, directory: Path, *, hashes: bool = True) -> list[str]:
        """Compare a directory with the manifest.

        Args:
            directory: what should hold exactly the listed files.
            hashes: False compares names and sizes only, which costs no reading.

        Returns:
            One line a file that is missing, surplus or different; empty when it is whole.
        """
        found = {file.relative_to(directory).as_posix(): file for file in walk_files(directory)}
        problems = [f"{path}: not in the manifest" for path in found.keys() - self._paths()]
        for entry in self.files:
            file = found.get(entry.path)
            if file is None:
                problems.append(f"{entry.path}: missing")
            elif (size := file.stat().st_size) != entry.size:
                problems.append(f"{entry.path}: {size} bytes, expected {entry.size}")
            elif hashes and (digest := sha256_of_file(file)) != entry.sha256:
                problems.append(f"{entry.path}: sha256 {digest}, expected {entry.sha256}")
        return sorted(problems)

    def changes(self, other: Manifest) -> list[str]:
        """One line a file in which another manifest differs from this one, in order of paths."""
        mine = {entry.path: entry for entry in self.files}
        others = {entry.path: entry for entry in other.files}
        lines = []
        for path in sorted(mine.keys() | others.keys()):
            before, after = mine.get(path), others.get(path)
            if before is None:
                lines.append(f"{path}: was not there")
            elif after is None:
                lines.append(f"{path}: is missing")
            elif before.size != after.size:
                lines.append(f"{path}: {after.size} bytes, were {before.size}")
            elif before.sha256 != after.sha256:
                lines.append(f"{path}: sha256 {after.sha256}, was {before.sha256}")
        return lines

    def _paths(self) -> set[str]:
        return {f.path for f in self.files}


def walk_files(directory: Path) -> Iterator[Path]:
    """Every regular file below a directory in a stable order, without the manifest."""
    for file in sorted(directory.rglob("*")):
        if file.is_file() and file != directory / MANIFEST_NAME:
            yield file


def sha256_of_file(file: Path) -> str:
    """The sha256 of a file's content as hex, read in pieces."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
