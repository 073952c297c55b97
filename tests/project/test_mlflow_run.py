"""`mlflow run` as others call it: from a git server, and in an environment made by uv."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.fixtures.tiny_line import write_profile

pytestmark = pytest.mark.slow

EXPERIMENT = "phi3-mlflow"
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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
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

    @property
    def tracking_uri(self) -> str:
        return f"sqlite:///{self.folder / 'mlflow.db'}"

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
            "PHI3_MLFLOW_CACHE": str(self.folder / "cache"),
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

    def last_run(self):
        client = MlflowClient(self.tracking_uri)
        experiment = client.get_experiment_by_name(EXPERIMENT)
        assert experiment is not None
        return client.search_runs([experiment.experiment_id], order_by=["start_time DESC"])[0]


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


def test_main_leaves_nothing_needed_in_the_clone(served, caller):
    caller.mlflow_run(served.url, "--env-manager", "local")
    shutil.rmtree(caller.clones)
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
    assert version.tags["git_commit"] == served.commits["trunk"]
    for experiment in client.search_experiments():
        assert str(caller.clones) not in experiment.artifact_location


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
