"""What a long step keeps of its work until its output is there; see `artifacts.unfinished`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phi3_mlflow.artifacts.cache import StepCache
from phi3_mlflow.artifacts.unfinished import drop_kept_folder, kept_folder

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

    from phi3_mlflow.artifacts.cache import Entry
    from phi3_mlflow.pipeline.step import Step, Work


def kept_work(step: Step[Any, Any], work: Work[Any]) -> AbstractContextManager[Path]:
    """The folder for what is finished of a step's work; nobody else is at it meanwhile."""
    return kept_folder(work.cache, step.name, work.key)


def drop_kept_work(step: Step[Any, Any], entry: Entry) -> None:
    """Remove what was kept of the work on an output that is there."""
    drop_kept_folder(StepCache(), step.name, entry.key)
