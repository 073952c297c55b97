"""`mlflow run` as others call it: from a git server, and in an environment made by uv."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient

from phi3_mlflow.artifacts.cache import StepCache
from phi3_mlflow.artifacts.provenance import content_manifest
from tests.fixtures.postgres import free_port, missing_postgres, running_postgres
from tests.fixtures.tiny_line import write_profile

pytestmark = pytest.mark.slow

EXPERIMENT = "phi3-mlflow"
MEASURES_THE_MACHINE = re.compile(
    r"^system/|seconds|_s$|_s\.|per_second|time|memory|rss|bytes_read|bytes_written|cpu|load|latency"
)
GIT = ("git", "-c", "user.name=Test", "-c", "user.email=test@example.com")


@dataclass(frozen=True)
class Served:
    """A repository on a git server: the project's tracked files as they are now."""

    url: str
    commits: dict[str, str]


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [*GIT, *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def copy_tracked(root: Path, target: Path) -> None:
    for name in git(root, "ls-files", "-z").split("\0"):
        if name and (root / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name)


@pytest.fixture(scope="module")
def served(root, tmp_path_factory) -> Iterator[Served]:
    """`git daemon` on loopback: a true git URL, which MLflow clones."""
    base = tmp_path_factory.mktemp("git")
    project = base / "project"
    project.mkdir()
    copy_tracked(root, project)
    git(project, "init", "--quiet", "--initial-branch=trunk")
    git(project, "add", "--all")
    git(project, "commit", "--quiet", "-m", "One")
    git(project, "tag", "v1.0.0")
    commits = {"v1.0.0": git(project, "rev-parse", "HEAD")}
    (project / "CHANGELOG.md").write_text("changed\n")
    git(project, "commit", "--quiet", "--all", "-m", "Two")
    commits["trunk"] = git(project, "rev-parse", "HEAD")
    port = free_port()
    daemon = subprocess.Popen(
        ["git", "daemon", "--listen=127.0.0.1", f"--port={port}", "--export-all",
         f"--base-path={base}", str(base)],
        start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert daemon.poll() is None, "git daemon did not start"
            time.sleep(0.1)
        yield Served(f"git://127.0.0.1:{port}/project", commits)
    finally:
        os.killpg(daemon.pid, signal.SIGTERM)
        daemon.wait()


@dataclass(frozen=True)
class Caller:
    """Somebody's folder with a tracking store, a cache and a profile; the project is not in it."""

    folder: Path
    profile: Path
    server: str | None = None

    @property
    def tracking_uri(self) -> str:
        return self.server or f"sqlite:///{self.folder / 'mlflow.db'}"

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    @property
    def clones(self) -> Path:
        return self.folder / "tmp"

    def run(
        self, *command: str, environment: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        hidden = ("MLFLOW_", "PYTHONPATH", "PHI3_", "VIRTUAL_ENV")
        own = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
        own |= {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "MLFLOW_TRACKING_URI": self.tracking_uri,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "PHI3_MLFLOW_CACHE": str(self.cache),
            "TMPDIR": str(self.clones),
            **(environment or {}),
        }
        self.clones.mkdir(exist_ok=True)
        return subprocess.run(command, cwd=self.folder, env=own, capture_output=True, text=True)

    def mlflow_run(self, *options: str, **more: dict[str, str]) -> str:
        """`mlflow run` with this profile; returns what was printed."""
        done = self.run(
            "mlflow", "run", *options, "--experiment-name", EXPERIMENT,
            "-P", f"profile={self.profile}", **more,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def last_run(self, step: str | None = None):
        client = MlflowClient(self.tracking_uri)
        experiment = client.get_experiment_by_name(EXPERIMENT)
        assert experiment is not None
        only = f"tags.step = '{step}'" if step else ""
        newest = ["start_time DESC"]
        return client.search_runs([experiment.experiment_id], only, order_by=newest)[0]


@pytest.fixture(scope="module")
def caller(tmp_path_factory) -> Caller:
    folder = tmp_path_factory.mktemp("caller")
    return Caller(folder, write_profile(folder))


@pytest.mark.parametrize("version", ["trunk", "v1.0.0", "full hash"])
def test_a_step_from_a_git_url(served, caller, version):
    commit = served.commits["trunk" if version == "trunk" else "v1.0.0"]
    given = commit if version == "full hash" else version
    # An output's key holds the code's content, not the folder it was cloned into: whoever comes
    # second finds what the first one made, also at another commit of the same code.
    made_before = (caller.folder / "cache").exists()
    caller.mlflow_run(served.url, "-v", given, "-e", "fetch", "--env-manager", "local")
    run = caller.last_run()
    assert run.info.status == "FINISHED"
    assert run.data.tags.get("cached") == ("true" if made_before else None)
    assert run.data.tags["mlflow.source.git.commit"] == commit
    assert run.data.tags["git_commit"] == commit
    assert run.data.tags["mlflow.source.name"] == served.url
    shutil.rmtree(caller.clones)
    client = MlflowClient(caller.tracking_uri)
    manifest = Path(client.download_artifacts(run.info.run_id, "manifest/fetch.json"))
    files = json.loads(manifest.read_text())["files"]
    output = Path(run.data.tags["output_path"])
    assert files
    assert output.is_relative_to(caller.folder / "cache")
    for file in files:
        assert (output / file["path"]).stat().st_size == file["size"]


@pytest.fixture(scope="module")
def tracking_server(tmp_path_factory) -> Iterator[str | None]:
    """MLflow's server over PostgreSQL, its artifacts in a folder of its own; None without one."""
    if missing_postgres():
        yield None
        return
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    with running_postgres() as database, (folder / "log").open("w") as log:
        server = subprocess.Popen(
            ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
             "--backend-store-uri", database, "--artifacts-destination", str(folder / "store")],
            cwd=folder, start_new_session=True, stdout=log, stderr=log,
        )  # fmt: skip
        try:
            url = f"http://127.0.0.1:{port}"
            for _ in range(600):
                with suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
                    break
                assert server.poll() is None, (folder / "log").read_text()
                time.sleep(0.2)
            yield url
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


@pytest.fixture(scope="module")
def first(served, caller) -> Caller:
    """`main` from the git URL, the clone gone."""
    caller.mlflow_run(served.url, "-v", "trunk", "--env-manager", "local")
    shutil.rmtree(caller.clones)
    return caller


@pytest.fixture(scope="module")
def second(served, caller, tracking_server, tmp_path_factory) -> Caller:
    """The same in another folder, with another cache and, where there can be one, on a server."""
    other = Caller(tmp_path_factory.mktemp("another"), caller.profile, tracking_server)
    other.mlflow_run(served.url, "-v", "v1.0.0", "--env-manager", "local")
    shutil.rmtree(other.clones)
    return other


def assert_nothing_needed_is_in_the_clone(caller: Caller, commit: str) -> None:
    """The clone is gone; what a run leaves has to work without it."""
    ask = (
        "import mlflow; model = mlflow.pyfunc.load_model('models:/tiny@champion');"
        "answer = model.predict({'messages': [{'role': 'user', 'content': 'Hello'}],"
        " 'max_tokens': 3, 'temperature': 0.0});"
        "print('ANSWER', (answer[0] if isinstance(answer, list) else answer)['usage'])"
    )
    done = caller.run(sys.executable, "-c", ask)
    assert done.returncode == 0, done.stderr
    assert "completion_tokens" in done.stdout
    client = MlflowClient(caller.tracking_uri)
    version = client.get_model_version_by_alias("tiny", "champion")
    assert version.tags["git_commit"] == commit
    for experiment in client.search_experiments():
        assert str(caller.clones) not in experiment.artifact_location


def test_main_leaves_nothing_needed_in_the_clone(served, first):
    assert_nothing_needed_is_in_the_clone(first, served.commits["trunk"])


def test_main_on_a_server_with_postgresql_and_artifacts_elsewhere(served, second):
    if reason := missing_postgres():
        pytest.skip(reason)
    assert_nothing_needed_is_in_the_clone(second, served.commits["v1.0.0"])
    assert not (second.folder / "mlruns").exists()
    assert not (second.folder / "mlflow.db").exists()
    client = MlflowClient(second.tracking_uri)
    run = second.last_run("evaluate")
    assert run.info.status == second.last_run("main").info.status == "FINISHED"
    assert run.info.artifact_uri.startswith("mlflow-artifacts:")
    listed = [file.path for file in client.list_artifacts(run.info.run_id, "evaluation")]
    assert listed
    place = Path(client.download_artifacts(run.info.run_id, listed[0], str(second.folder)))
    assert any(place.rglob("*")) or place.stat().st_size


def test_two_clean_clones_with_two_caches_make_the_same_bytes_and_figures(first, second):
    made = {}
    for step in ("fetch", "quantize", "export"):
        outputs = [StepCache(caller.cache).latest("tiny", step) for caller in (first, second)]
        assert outputs[0].path != outputs[1].path
        assert outputs[0].manifest.changes(outputs[1].manifest) == [], step
        made[step] = content_manifest(outputs[0].path)
    assert {"model.onnx", "model.onnx.data"} <= {file.path for file in made["export"].files}
    figures = []
    for caller in (first, second):
        version = MlflowClient(caller.tracking_uri).get_model_version_by_alias("tiny", "champion")
        assert version.tags["artifact_sha256"] == made["export"].digest
        metrics = caller.last_run("evaluate").data.metrics
        figures.append({k: v for k, v in metrics.items() if not MEASURES_THE_MACHINE.search(k)})
    assert {"perplexity", "kl_mean", "top1_agreement", "accuracy"} <= figures[0].keys()
    assert figures[0] == figures[1]


def test_a_version_of_another_commit_is_made_again_with_that_commits_code(served, first):
    """The code that runs is at v1.0.0, of which MLflow clones nothing else."""
    client = MlflowClient(first.tracking_uri)
    before = [v.version for v in client.search_model_versions("name='tiny'")]
    printed = first.mlflow_run(
        served.url, "-v", "v1.0.0", "-e", "reproduce", "-P", "version=models:/tiny@champion",
        "--env-manager", "local",
    )  # fmt: skip
    assert f"with the code of {served.commits['trunk']}" in printed
    assert "the same: " in printed
    run = first.last_run("reproduce")
    assert run.data.tags["reproduced"] == "true"
    assert run.data.tags["git_commit"] == served.commits["v1.0.0"]
    steps = client.search_runs(
        [run.info.experiment_id], f"tags.mlflow.parentRunId = '{run.info.run_id}'"
    )
    assert {r.data.tags["step"]: r.info.status for r in steps} == dict.fromkeys(
        ("fetch", "quantize", "export"), "FINISHED"
    )
    assert {r.data.tags["git_commit"] for r in steps} == {served.commits["trunk"]}
    assert not any("cached" in r.data.tags for r in steps)
    result = Path(client.download_artifacts(run.info.run_id, "reproduction.json"))
    assert json.loads(result.read_text())["differences"] == []
    assert [v.version for v in client.search_model_versions("name='tiny'")] == before
    assert list((first.cache / "building").iterdir()) == []


def test_uv_makes_the_locked_environment_and_runs_in_it(root, caller, tmp_path, tool):
    """MLflow's own way through conda.yaml: the closure is the lock's, and pip is there."""
    pip_env = tool("pip_env")
    environment = pip_env.uv_variables(pip_env.pip_configuration(), os.environ)
    # Files are linked from uv's cache; the environment lies on the same disk or is copied.
    environment |= {"MLFLOW_ENV_ROOT": str(tmp_path / "envs"), "UV_LINK_MODE": "hardlink"}
    printed = caller.mlflow_run(
        str(root), "-e", "fetch", "--env-manager", "uv", environment=environment
    )
    assert "Creating a new environment" in printed
    (made,) = (tmp_path / "envs").iterdir()
    listing = subprocess.run(
        [str(made / "bin" / "python"), "-m", "pip", "list", "--format", "json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    installed = {
        package["name"].lower().replace("_", "-"): package["version"].partition("+")[0]
        for package in json.loads(listing.stdout)
    }
    text = (root / "requirements" / "constraints.txt").read_text(encoding="utf-8")
    locked = dict(
        line.lower().replace("_", "-").split("==") for line in text.splitlines() if "==" in line
    )
    assert {name: locked.get(name) for name in installed} == installed
    assert caller.last_run().data.tags["mlflow.project.env"] == "uv"
