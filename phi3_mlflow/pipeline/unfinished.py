"""What a long step keeps of its work until its output is there, so that a kill costs little.

It lies among the downloads of the step cache, under the key of the output: `cache -P do=prune`
leaves it alone while somebody is at it, and counts and removes it like any other later.
"""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from phi3_mlflow.artifacts.cache import StepCache

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from phi3_mlflow.artifacts.cache import Entry
    from phi3_mlflow.pipeline.step import Step, Work


@contextmanager
def kept_work(step: Step[Any, Any], work: Work[Any]) -> Iterator[Path]:
    """The folder for what is finished of a step's work; nobody else is at it meanwhile."""
    from filelock import FileLock

    folder = _folder(work.cache, step, work.key)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        yield folder


def drop_kept_work(step: Step[Any, Any], entry: Entry) -> None:
    """Remove what was kept of the work on an output that is there."""
    folder = _folder(StepCache(), step, entry.key)
    shutil.rmtree(folder, ignore_errors=True)
    folder.with_name(f"{folder.name}.lock").unlink(missing_ok=True)


def _folder(cache: StepCache, step: Step[Any, Any], key: str) -> Path:
    return cache.downloads / f"{step.name}-{key}"
