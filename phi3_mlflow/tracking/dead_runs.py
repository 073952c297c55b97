"""Runs that MLflow shows as RUNNING and that nobody works on any more."""

from __future__ import annotations

import os
import socket
import time
from typing import TYPE_CHECKING

from phi3_mlflow.tracking.connection import tracking_uri
from phi3_mlflow.tracking.openers import opener_is_gone

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mlflow.entities import Run

_LONGEST_TO_BEGIN_S = 86400  # an environment takes minutes


def close_dead_runs(experiment_id: str, own: str | None = None) -> list[str]:
    """Close runs that are still RUNNING and never will be anything else, as KILLED.

    These are the runs of processes of this machine that are no more, and those that `mlflow run`
    opened for an environment that was never made: at once where no process can be at it any more
    (see `openers`), else after a day. One that should begin after all is RUNNING again by that.

    Args:
        experiment_id: where to look.
        own: the run of this process, which may not have said yet whose it is.

    Returns:
        The ids of the runs that were closed.
    """
    from mlflow import MlflowClient

    client = MlflowClient()
    running = client.search_runs([experiment_id], "attributes.status = 'RUNNING'")
    others = [run for run in running if run.info.run_id != own]
    dead = {run.info.run_id: why for run in others if (why := _why_dead(run))}
    for run_id, why in dead.items():
        for name, value in (("error", why), ("outcome", "stopped"), ("exit_code", "unknown")):
            client.set_tag(run_id, name, value)
        client.set_terminated(run_id, "KILLED")
    return list(dead)


def _why_dead(run: Run) -> str | None:
    """Why a run that MLflow shows as RUNNING is not; None when it may be."""
    tags = run.data.tags
    if "owner_host" in tags:
        mine = tags["owner_host"] == socket.gethostname()
        gone = mine and not _alive(tags)
        return "the process that did the work ended without a word" if gone else None
    if tags.get("mlflow.source.type") != "PROJECT" or "step" in tags:
        return None
    began = run.info.start_time / 1000
    too_old = time.time() - began > _LONGEST_TO_BEGIN_S
    if too_old or opener_is_gone(run.info.run_id, tags.get("mlflow.user"), began, tracking_uri()):
        return "it never began: most likely its environment could not be made"
    return None


def owner_tags() -> dict[str, str]:
    """Tags that tell later whether the process of a run still exists."""
    import psutil

    return {
        "owner_host": socket.gethostname(),
        "owner_pid": str(os.getpid()),
        "owner_started": str(psutil.Process().create_time()),
    }


def _alive(tags: Mapping[str, str]) -> bool:
    import psutil

    try:
        process = psutil.Process(int(tags["owner_pid"]))
        # The number may have gone to another process since.
        same = abs(float(process.create_time()) - float(tags["owner_started"])) < 1
        return same and str(process.status()) != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except (KeyError, ValueError, psutil.Error):
        return True  # not known to be dead
