"""What long work keeps of itself until its output is there, so that a kill costs little.

It lies among the downloads of the step cache, under the key of the output: `cache -P do=prune`
leaves it alone while somebody is at it, and counts and removes it like any other later.
"""

from __future__ import annotations

import shutil
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from phi3_mlflow.artifacts.cache import StepCache


@contextmanager
def kept_folder(cache: StepCache, step: str, key: str) -> Iterator[Path]:
    """The folder for what is finished of the work on an output; nobody else is at it meanwhile.

    Where nothing was kept it is gone afterwards.
    """
    from filelock import FileLock

    folder = _folder(cache, step, key)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        try:
            yield folder
        finally:
            with suppress(OSError):  # there is something in it
                folder.rmdir()


def drop_kept_folder(cache: StepCache, step: str, key: str) -> None:
    """Remove what was kept of the work on an output that is there."""
    folder = _folder(cache, step, key)
    shutil.rmtree(folder, ignore_errors=True)
    folder.with_name(f"{folder.name}.lock").unlink(missing_ok=True)


def _folder(cache: StepCache, step: str, key: str) -> Path:
    return cache.downloads / f"{step}-{key}"
