"""Digests of what comes in, computed while it is written and not in a second pass."""

from __future__ import annotations

import errno
import hashlib
import os
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, TYPE_CHECKING, BinaryIO, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path
    from types import TracebackType

CHUNK = 1 << 20  # bytes; large enough that the hand-over between threads costs nothing


_STEP = 1 << 23  # bytes the kernel copies before the digest follows


class Digest(Protocol):
    """What hashlib's objects do."""

    def update(self, data: bytes, /) -> None:
        """Take in bytes."""


class FileDigest(NamedTuple):
    """What a file holds: `size` in bytes, `sha256` in hex."""

    size: int
    sha256: str


class Expected(NamedTuple):
    """What a file must be.

    Attributes:
        size: bytes, None when the source does not say.
        sha256: hex, or None.
        git_blob: the SHA-1 git gives a file, which is what the hub states for files outside LFS.
    """

    size: int | None = None
    sha256: str | None = None
    git_blob: str | None = None

    @property
    def key(self) -> str | None:
        """The content's name, the same wherever and whenever it is fetched."""
        return self.sha256 or self.git_blob


def mismatch(what: str, expected: Expected, found: FileDigest, blob: str | None = None) -> str:
    """What differs between a file and what it must be, as text; empty when nothing does."""
    pairs = (
        ("size", expected.size, found.size),
        ("sha256", expected.sha256, found.sha256),
        ("git blob", expected.git_blob, blob if expected.git_blob else None),
    )
    wrong = [(name, want, have) for name, want, have in pairs if want is not None and want != have]
    if not wrong:
        return ""
    facts = "; ".join(f"{name} expected {want}, found {have}" for name, want, have in wrong)
    return f"{what} is not what it must be: {facts}"


class DigestingFile:
    """A file being written whose digests are known the moment the last byte is.

    Hashing runs in a thread of its own while the file is written (hashlib and write both release
    the interpreter lock), so it costs time only where it is slower than the disk or the network.
    """

    def __init__(self, stream: BinaryIO, git_size: int | None = None) -> None:
        """Write to `stream`, which stays as it is until then.

        Args:
            stream: open for reading and writing.
            git_size: the size the file will have, to also compute its git blob id.
        """
        self._stream = stream
        self._git_size = git_size
        self._pool = ThreadPoolExecutor(1, "digest")
        self._pending: Future[None] | None = None
        self._begin()

    def restart(self) -> None:
        """Forget what was written and begin again with an empty file."""
        self._wait()
        self._begin()
        self._stream.seek(0)
        self._stream.truncate()

    def _begin(self) -> None:
        self._sha256 = hashlib.sha256()
        self._git = None
        if self._git_size is not None:
            # SHA-1 is what git uses; nothing else about these files is stated by the hub.
            header = f"blob {self._git_size}\0".encode()
            self._git = hashlib.sha1(header, usedforsecurity=False)
        self.size = 0

    def resume(self) -> None:
        """Take the bytes that are already in the file as written; read them for the digests."""
        self._begin()
        self._stream.seek(0)
        while chunk := self._stream.read(CHUNK):
            self._digest(chunk)
            self.size += len(chunk)
        self._wait()
        self._stream.seek(self.size)

    def write(self, chunk: bytes | memoryview) -> None:
        """Append; the buffer must stay as it is until the next call."""
        self._wait()
        self._pending = self._pool.submit(self._digest, chunk)
        self._stream.write(chunk)
        self.size += len(chunk)

    def digest(self) -> tuple[FileDigest, str | None]:
        """Size and sha256, and the git blob id where it was asked for."""
        self._wait()
        return (
            FileDigest(self.size, self._sha256.hexdigest()),
            self._git.hexdigest() if self._git else None,
        )

    def _digest(self, chunk: bytes | memoryview) -> None:
        self._sha256.update(chunk)
        if self._git is not None:
            self._git.update(chunk)

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def __enter__(self) -> DigestingFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True)


def digest_file(file: Path, advance: Callable[[int], None] | None = None) -> FileDigest:
    """Read a file once for its size and sha256."""
    sha256, size = hashlib.sha256(), 0
    buffer = bytearray(CHUNK)
    view = memoryview(buffer)
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            sha256.update(view[:count])
            size += count
            if advance:
                advance(count)
    return FileDigest(size, sha256.hexdigest())


def copy_with_digest(
    source: Path, target: Path, advance: Callable[[int], None] | None = None
) -> FileDigest:
    """Copy a file's content and say what was written.

    The kernel copies; what it wrote is read back for the digest in a thread of its own, a step
    behind, while it still is in memory.

    Args:
        source: a file.
        target: written anew.
        advance: told the bytes of every step.

    Returns:
        Size and sha256 of the bytes that are in `target`.
    """
    sha256, size = hashlib.sha256(), 0
    with (
        source.open("rb") as reader,
        target.open("wb+") as writer,
        ThreadPoolExecutor(1, "digest") as pool,
    ):
        digested: list[Future[None]] = []
        for count in _copied(reader, writer):
            digested.append(pool.submit(_digest_range, writer.fileno(), size, count, sha256))
            size += count
            if advance:
                advance(count)
        for piece in digested:
            piece.result()
    return FileDigest(size, sha256.hexdigest())


def _copied(reader: BinaryIO, writer: BinaryIO) -> Iterator[int]:
    """Copy one file to another, yielding the bytes of every step once they are written."""
    position, last = 0, os.fstat(reader.fileno()).st_size
    if sys.platform == "linux":
        try:
            while count := os.sendfile(writer.fileno(), reader.fileno(), position, _STEP):
                position += count
                yield count
        except OSError as error:
            # Some file systems cannot; nothing was written yet when they say so.
            if position or error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSOCK):
                raise
        if position >= last:
            return
    while chunk := reader.read(CHUNK):
        writer.write(chunk)
        writer.flush()
        yield len(chunk)


def _digest_range(descriptor: int, start: int, count: int, sha256: Digest) -> None:
    """Take a part of a file into a digest."""
    end = start + count
    while start < end:
        chunk = os.pread(descriptor, min(CHUNK, end - start), start)
        if not chunk:
            raise OSError(errno.EIO, "the file became shorter while it was written")
        sha256.update(chunk)
        start += len(chunk)


def copy_stream_with_digest(
    source: IO[bytes], target: Path, advance: Callable[[int], None], most: int
) -> FileDigest:
    """Write what a stream holds to a file.

    Args:
        source: read to its end.
        target: written anew.
        advance: told the bytes of every step.
        most: bytes; more is a ValueError.

    Returns:
        Size and sha256 of what was written.
    """
    with target.open("wb+") as stream, DigestingFile(stream) as writer:
        while chunk := source.read(CHUNK):
            if writer.size + len(chunk) > most:
                raise ValueError(f"{target.name} holds more than the {most} bytes it states")
            writer.write(chunk)
            advance(len(chunk))
        return writer.digest()[0]


def digest_of_files(files: Iterable[tuple[str, FileDigest]]) -> str:
    """One sha256 for a set of files: names, sizes and contents, in whatever order they come."""
    lines = sorted(f"{digest.sha256} {digest.size} {name}\n" for name, digest in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()
