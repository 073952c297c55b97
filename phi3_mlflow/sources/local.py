"""`file:`: a checkpoint directory on this machine, copied and digested in one pass."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from phi3_mlflow.checkpoints import layout
from phi3_mlflow.core.errors import CheckpointRefused, UserError
from phi3_mlflow.sources.common import FetchedSource, Job, check_lock_names, require_room
from phi3_mlflow.sources.digests import (
    Expected,
    FileDigest,
    copy_with_digest,
    digest_file,
    digest_of_files,
    mismatch,
)

if TYPE_CHECKING:
    from pathlib import Path

    from phi3_mlflow.sources.spec import FileSource


def fetch_local(spec: FileSource, job: Job) -> FetchedSource:
    """Copy what a checkpoint needs from a directory; see `fetch_source`."""
    directory = spec.directory(job.base_dir)
    files = take_directory(directory, spec.text, job)
    return FetchedSource(
        source=spec.text,
        revision=digest_of_files(files.items()),
        files=files,
        bytes_downloaded=0,
        lock={name: digest.sha256 for name, digest in files.items()},
    )


def take_directory(directory: Path, source: str, job: Job) -> dict[str, FileDigest]:
    """Copy what a checkpoint needs into `job.out`, checked against the lock.

    Args:
        directory: a checkpoint in Hugging Face layout; nothing in it is changed.
        source: how to call it in messages.
        job: where to, and the lock.

    Returns:
        What was copied, by name.
    """
    names = needed_files(directory, source)
    check_lock_names(job.lock, names, source)
    sizes = {name: (directory / name).stat().st_size for name in names}
    require_room(job.out, sum(sizes.values()), source)
    files: dict[str, FileDigest] = {}
    with job.progress(f"copying {source}", sum(sizes.values())) as bar:
        for name in names:

            def advance(n: int) -> None:
                bar.advance(n)
                job.deadline.check(source)

            digest = copy_with_digest(directory / name, job.out / name, advance)
            # The size from before the copy catches a file that is being written meanwhile.
            wrong = mismatch(name, Expected(sizes[name], job.lock.get(name)), digest)
            if wrong:
                raise UserError(
                    f"{source}: {wrong}\nThe file changed since the profile's lock was written, or "
                    "while it was read."
                )
            files[name] = digest
    return files


def resolve_local(spec: FileSource, base_dir: Path) -> str:
    """The digest of the files that would be taken; reads them all."""
    directory = spec.directory(base_dir)
    names = needed_files(directory, spec.text)
    return digest_of_files((name, digest_file(directory / name)) for name in names)


def needed_files(directory: Path, source: str) -> list[str]:
    """The names of the files to take from a directory, each a regular file in it.

    Raises:
        UserError: there is no such directory, or it cannot be read.
        CheckpointRefused: no configuration, no weights, or a link among the files.
    """
    if not directory.is_dir():
        raise UserError(f"{source}: there is no directory {directory}")
    try:
        names = os.listdir(directory)  # noqa: PTH208 - names, and nothing followed
    except OSError as error:
        raise UserError(f"{source}: {directory} cannot be read: {error.strerror}") from error
    small = layout.small_files(names)
    if layout.CONFIG not in small:
        raise CheckpointRefused(f"{source}: {directory} has no {layout.CONFIG}")
    for name in small:
        _require_regular(directory / name, source)
        if (directory / name).stat().st_size > layout.LARGEST_SMALL_FILE:
            raise CheckpointRefused(
                f"{source}: {name} is larger than {layout.LARGEST_SMALL_FILE} bytes"
            )
    index = (directory / layout.INDEX).read_bytes() if layout.INDEX in small else None
    weights = layout.weight_files(names, index)
    for name in weights:
        _require_regular(directory / name, source)
    return [*layout.without_stale_index(small, weights, index), *weights]


def _require_regular(file: Path, source: str) -> None:
    mode = file.lstat().st_mode
    if stat.S_ISLNK(mode):
        raise CheckpointRefused(
            f"{source}: {file.name} is a link ({file.readlink()}); links are not followed, they "
            "can lead out of the directory. Copy the file there: cp -L."
        )
    if not stat.S_ISREG(mode):
        raise CheckpointRefused(f"{source}: {file.name} is not a regular file")
