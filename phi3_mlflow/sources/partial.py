"""Files on their way: kept between attempts, named for their content, checked before use."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from phi3_mlflow.sources.common import move_into
from phi3_mlflow.sources.digests import DigestingFile, Expected, FileDigest, mismatch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from phi3_mlflow.core.progress import Meter


@dataclass(frozen=True)
class WholeFile:
    """A file that came down whole and was checked; `path` is where it lies for now."""

    path: Path
    digest: FileDigest

    def move_to(self, target: Path) -> None:
        """Move it to its place, checked again when that is another file system."""
        move_into(self.path, target, self.digest)


@dataclass(frozen=True)
class PartialFile:
    """One file of a source in the downloads directory.

    The name on disk holds the digest the source states, so the beginning of one file is never
    continued with another's end, and a new commit goes on with what it shares with an old one.

    Attributes:
        name: the file's name in the checkpoint.
        key: the digest the source states.
        expected: size and digests it must have, the profile's lock included.
        downloads: the directory.
    """

    name: str
    key: str
    expected: Expected
    downloads: Path

    @property
    def whole_path(self) -> Path:
        """Where the file lies once it is whole."""
        return self.downloads / f"{self.key}-{self.name}"

    @property
    def part_path(self) -> Path:
        """Where the file lies until then."""
        return self.downloads / f"{self.key}-{self.name}.part"

    def standing(self) -> int:
        """Bytes that are there, whole or in part, as far as their size tells."""
        for path in (self.whole_path, self.part_path):
            if path.is_file() and not path.is_symlink():
                return path.stat().st_size
        return 0

    def whole(self, bar: Meter) -> WholeFile | None:
        """The file, when an earlier attempt brought it whole and it still is what it must be."""
        path = self.whole_path
        if path.is_symlink() or not path.is_file():
            path.unlink(missing_ok=True)
            return None
        with path.open("rb+") as stream, DigestingFile(stream, self._git_size) as reader:
            reader.resume()
            digest, blob = reader.digest()
        if mismatch(self.name, self.expected, digest, blob):
            path.unlink()
            return None
        bar.advance(digest.size)
        return WholeFile(path, digest)

    @contextmanager
    def open_part(self) -> Iterator[DigestingFile]:
        """The part that is there, ready to be continued."""
        path = self.part_path
        if path.is_symlink():
            path.unlink()
        path.touch()
        with path.open("rb+") as stream, DigestingFile(stream, self._git_size) as writer:
            writer.resume()
            yield writer

    def finish(self, digest: FileDigest) -> WholeFile:
        """The part is whole and checked: give it the whole file's name.

        It is not forced to the disk: whoever finds the file later checks its digest again.
        """
        self.part_path.replace(self.whole_path)
        return WholeFile(self.whole_path, digest)

    @property
    def _git_size(self) -> int | None:
        return self.expected.size if self.expected.git_blob else None
