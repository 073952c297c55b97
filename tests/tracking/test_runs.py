"""Which runs are closed as KILLED, and which are left alone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

from phi3_mlflow.core.errors import GateRefused, UserError
from phi3_mlflow.core.shipped import shipped
from phi3_mlflow.tracking import registry
from phi3_mlflow.tracking.runs import child_run, close_dead_runs, step_run, without_folders
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


@pytest.mark.parametrize(
    ("raised", "outcome", "code", "status"),
    [
        (None, "done", "0", "FINISHED"),
        (UserError("no"), "bad_input", "2", "FAILED"),
        (GateRefused("no"), "refused", "3", "FAILED"),
        (ValueError("a fault"), "failed", "1", "FAILED"),
        (KeyboardInterrupt(), "stopped", "130", "KILLED"),
        (SystemExit(143), "stopped", "143", "KILLED"),
    ],
)
def test_every_run_says_how_it_ended(
    raised: BaseException | None, outcome: str, code: str, status: str, workspace: Workspace
) -> None:
    ids = []
    with suppress(BaseException), step_run("export", "tiny") as run:
        ids.append(run.run_id)
        with child_run("part", {}) as child:
            ids.append(child)
            if raised is not None:
                raise raised
    for run_id in ids:
        found = registry.client().get_run(run_id)
        tags = found.data.tags
        assert (tags["outcome"], tags["exit_code"]) == (outcome, code)
    assert registry.client().get_run(ids[0]).info.status == status
    assert registry.client().get_run(ids[0]).info.run_name == "export tiny"


@pytest.mark.parametrize(
    ("given", "shown"), [("bold-fox-123", "main tiny"), ("my own name", "my own name")]
)
def test_a_run_that_mlflow_run_opened_is_named_unless_somebody_did(
    given: str, shown: str, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = registry.client()
    chosen = client.get_experiment_by_name("phi3-mlflow")
    made = client.create_run(chosen.experiment_id, run_name=given)
    monkeypatch.setenv("MLFLOW_RUN_ID", made.info.run_id)
    with step_run("main", "tiny") as run:
        assert run.run_id == made.info.run_id
    assert registry.client().get_run(made.info.run_id).info.run_name == shown


def test_parameters_are_without_folders_of_this_machine(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace.enter(monkeypatch)
    kept = workspace.cache / "outputs" / "fetch" / "abc"
    assert without_folders(str(kept)) == "cache:outputs/fetch/abc"
    assert without_folders(str(shipped("data") / "heldout.jsonl")) == "project:data/heldout.jsonl"
    assert without_folders("/home/me/secret place/rows.jsonl") == "…/rows.jsonl"
    assert without_folders("sqlite:////home/me/mlflow.db") == "sqlite:///…/mlflow.db"
    for other in ("models:/m/1", "hf:a/b@c", "", "a/b", "3"):
        assert without_folders(other) == other
    with step_run("export", "tiny") as run:
        run.log_settings({"a": None, "b": 1, "c": {"d": str(kept)}}, {})
    params = registry.client().get_run(run.run_id).data.params
    assert params == {"resolved.b": "1", "resolved.c.d": "cache:outputs/fetch/abc"}


def test_what_a_run_costs_is_no_metric_of_its_model(workspace: Workspace) -> None:
    import mlflow

    with step_run("log", "tiny") as run:
        model = mlflow.create_external_model(name="model", source_run_id=run.run_id)
        run.link_models([model.model_id], ["models:/tiny/1"])
        run.log_headline({"wall_time_s": 1.5})
    found = registry.client().get_run(run.run_id)
    assert found.data.metrics["wall_time_s"] == 1.5
    assert [output.model_id for output in found.outputs.model_outputs] == [model.model_id]
    assert not registry.client().get_logged_model(model.model_id).metrics
