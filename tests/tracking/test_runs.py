"""Which runs are closed as KILLED, and which are left alone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import psutil
import pytest

from phi3_mlflow.tracking import registry
from phi3_mlflow.tracking.runs import close_dead_runs
from tests.conftest import Workspace

DAY_MS = 86_400_000


def owner(pid: int, host: str | None = None, began: float | None = None) -> dict[str, str]:
    started = psutil.Process(pid).create_time() if began is None else began
    return {
        "step": "export",
        "owner_host": host or socket.gethostname(),
        "owner_pid": str(pid),
        "owner_started": str(started),
    }


def ended_process() -> tuple[int, float]:
    process = subprocess.Popen([sys.executable, "-c", ""])
    began = psutil.Process(process.pid).create_time()
    process.wait()
    return process.pid, began


def opened(age_days: float, **tags: str) -> tuple[dict[str, str], int]:
    known = {"mlflow.source.type": "PROJECT", **tags}
    return known, int(time.time() * 1000 - age_days * DAY_MS)


@pytest.fixture
def experiment(workspace: Workspace) -> str:
    return str(registry.client().create_experiment("test"))


def test_runs_of_the_dead_are_closed_and_those_of_the_living_are_not(experiment: str) -> None:
    client = registry.client()
    pid, began = ended_process()
    made = {
        "dead": client.create_run(experiment, tags=owner(pid, began=began)),
        "number taken": client.create_run(experiment, tags=owner(os.getpid(), began=began - 99)),
        "alive": client.create_run(experiment, tags=owner(os.getpid())),
        "elsewhere": client.create_run(experiment, tags=owner(pid, "another-host", began)),
        "somebody's": client.create_run(experiment),
    }
    for name, (tags, start) in {
        "environment failed": opened(2),
        "environment being made": opened(0.1),
        "at work for days": opened(2, step="main"),
    }.items():
        made[name] = client.create_run(experiment, start_time=start, tags=tags)
    closed = set(close_dead_runs(experiment))
    states = {name: client.get_run(run.info.run_id) for name, run in made.items()}
    killed = {name for name, run in states.items() if run.info.status == "KILLED"}
    assert killed == {"dead", "number taken", "environment failed"}
    assert closed == {made[name].info.run_id for name in killed}
    assert "without a word" in states["dead"].data.tags["error"]
    assert "environment" in states["environment failed"].data.tags["error"]
    assert close_dead_runs(experiment) == []
