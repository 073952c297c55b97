"""Which runs are closed as KILLED, and which are left alone."""

from __future__ import annotations

import getpass
import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from phi3_mlflow.artifacts.inputs import Input
from phi3_mlflow.core.errors import GateRefused, UserError
from phi3_mlflow.core.shipped import shipped
from phi3_mlflow.tracking import openers, registry
from phi3_mlflow.tracking.runs import (
    child_run,
    close_dead_runs,
    setting_text,
    step_run,
    without_folders,
)
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


def test_a_run_whose_mlflow_run_is_gone_is_closed_at_once(
    experiment: str, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which processes there are is made up: this machine's own would decide the test."""
    client = registry.client()
    user = getpass.getuser()
    known, start = opened(0.001, **{"mlflow.user": user})

    def state(of: str = user) -> str:
        tags = {**known, "mlflow.user": of}
        run_id = client.create_run(experiment, start_time=start, tags=tags).info.run_id
        close_dead_runs(experiment)
        status = str(client.get_run(run_id).info.status)
        client.set_terminated(run_id)
        return status

    monkeypatch.setattr(openers, "_processes", lambda: iter(()))
    monkeypatch.setattr(openers, "only_of_this_machine", lambda uri: uri == workspace.tracking_uri)
    assert state() == "KILLED"
    assert state("somebody-else") == "RUNNING"
    mine = client.create_run(experiment, start_time=start, tags=known).info.run_id
    assert close_dead_runs(experiment, mine) == [], (
        "the one that this very process is about to begin"
    )
    monkeypatch.setattr(openers, "only_of_this_machine", lambda uri: False)
    assert state() == "RUNNING"


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="Linux tells it")
def test_the_process_that_opened_a_run_is_told_from_others() -> None:
    def started(*words: str) -> subprocess.Popen[bytes]:
        code = f"{'import sqlite3' if 'sqlite' in words else 'pass'}; print(flush=True); input()"
        process = subprocess.Popen(
            [sys.executable, "-c", code, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.readline()
        return process

    opener, other, handed = started("sqlite"), started(), started("--run-id", "r1")
    try:
        ways = {
            (process.pid, age): openers._may_have_opened(
                psutil.Process(process.pid), "r1", time.time() + age
            )
            for process in (opener, other, handed)
            for age in (60, -600)
        }
        assert ways == {
            (opener.pid, 60): True,
            (opener.pid, -600): False,  # the run was there before it
            (other.pid, 60): False,
            (other.pid, -600): False,
            (handed.pid, 60): False,
            (handed.pid, -600): True,
        }
        gone = psutil.Process(opener.pid)
        opener.kill()
        opener.wait()
        assert not openers._may_have_opened(gone, "r1", time.time() + 60)
    finally:
        for process in (opener, other, handed):
            process.kill()
            process.communicate()


@pytest.mark.parametrize(
    ("uri", "fstype", "known"),
    [
        ("sqlite:////data/mlflow.db", "ext4", True),
        ("sqlite:////data/mlflow.db", "nfs4", False),
        ("sqlite:////data/mlflow.db", "9p", False),
        ("postgresql://db/mlflow", "ext4", False),
        ("http://127.0.0.1:5000", "ext4", False),
    ],
)
def test_which_stores_only_this_machine_can_write_to(
    uri: str, fstype: str, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    disks = [
        SimpleNamespace(mountpoint="/", fstype="ext4"),
        SimpleNamespace(mountpoint="/data", fstype=fstype),
    ]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: disks)
    monkeypatch.setattr(openers, "_IN_A_CONTAINER", ())
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert openers.only_of_this_machine(uri) is known
    monkeypatch.setattr(openers, "_IN_A_CONTAINER", ("/",))
    assert not openers.only_of_this_machine(uri)
    disks[:] = [SimpleNamespace(mountpoint="/", fstype="overlay")]
    assert openers.only_of_this_machine(uri) is uri.startswith("sqlite")


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


def test_a_run_that_mlflow_run_opened_elsewhere_says_so(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = registry.client()
    chosen = client.get_experiment_by_name("phi3-mlflow").experiment_id
    # As in a new process; MLflow keeps the experiment that was chosen last.
    monkeypatch.setattr("mlflow.tracking.fluent._active_experiment_id", None)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID", raising=False)
    for experiment, told in (("0", True), (chosen, False)):
        monkeypatch.setenv("MLFLOW_RUN_ID", client.create_run(experiment).info.run_id)
        with step_run("main", "tiny"):
            pass
        assert ("--experiment-name phi3-mlflow" in capsys.readouterr().err) is told


def test_parameters_are_without_folders_of_this_machine(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace.enter(monkeypatch)
    kept = workspace.cache / "outputs" / "fetch" / "abc"
    assert without_folders(str(kept)) == "cache:outputs/fetch/abc"
    assert without_folders(str(shipped("data") / "heldout.jsonl")) == "project:data/heldout.jsonl"
    assert without_folders("/home/me/secret place/rows.jsonl") == "…/rows.jsonl"
    assert without_folders("sqlite:////home/me/mlflow.db") == "sqlite:///…/mlflow.db"
    assert without_folders("file:/home/me/checkpoint") == "file:…/checkpoint"
    assert without_folders("file:///home/me/checkpoint") == "file://…/checkpoint"
    assert setting_text(["/home/me/a", "b", 3]) == "['…/a', 'b', 3]"
    for other in ("models:/m/1", "hf:a/b@c", "", "a/b", "3"):
        assert without_folders(other) == other
    with step_run("export", "tiny") as run:
        champion = Input((), "", "")  # there is none
        settings = {"a": None, "b": 1, "c": {"d": str(kept)}}
        run.log_settings(settings, {"champion": champion})
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
