"""What all tests share: a workspace of their own, and one run of the whole line on the default."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# Nothing here may depend on what the developer's own environment points to.
for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
    os.environ.pop(name, None)

# How long drawing an example takes says something about the machine, not about the code.
settings.register_profile("any", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The fast tests first: what is broken should show soon."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several processes (`-n`), who runs what: the tests of a file stay together.

    So do the files that need the line on the embedded default: it takes minutes, and is run once.
    """
    from xdist.scheduler import LoadScopeScheduling

    names = ("default_run", "real_checkpoint", "real_onnx")
    files = (ROOT / "tests").rglob("test_*.py")
    of_default = {
        file.relative_to(ROOT).as_posix()
        for file in files
        if any(name in file.read_text(encoding="utf-8") for name in names)
    }

    class Scheduler(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "default" if file in of_default else file

    return Scheduler(config, log)


@dataclass(frozen=True)
class Workspace:
    """A working folder with a cache and a tracking store of its own."""

    folder: Path

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    @property
    def tracking_uri(self) -> str:
        return f"sqlite:///{self.folder / 'mlflow.db'}"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "PHI3_MLFLOW_CACHE": str(self.cache),
            "MLFLOW_TRACKING_URI": self.tracking_uri,
            "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "1",
        }

    @property
    def whole_environment(self) -> dict[str, str]:
        """What a program is started with: nothing that MLflow has left in this process."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        kept = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
        own = {"PATH": path, "PYTHONPATH": str(ROOT), "MLFLOW_DISABLE_TELEMETRY": "true"}
        return {**kept, **own, **self.environment}

    def enter(self, patch: pytest.MonkeyPatch) -> None:
        """Make this process work here, as a program that is started here would."""
        for name, value in self.environment.items():
            patch.setenv(name, value)
        # MLflow leaves the experiment that was chosen last here, which another store does not know.
        patch.setenv("MLFLOW_EXPERIMENT_ID", "")
        patch.delenv("MLFLOW_EXPERIMENT_ID")
        patch.chdir(self.folder)

    def run(self, *command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run a program of this environment; MLflow's artifacts land in this folder."""
        return subprocess.run(
            command,
            cwd=cwd or self.folder,
            env=self.whole_environment,
            capture_output=True,
            text=True,
        )

    def step(self, name: str, *options: str) -> subprocess.CompletedProcess[str]:
        """Run a step's script."""
        return self.run(sys.executable, "-m", f"steps.{name}", *options)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workspace]:
    """An empty workspace, set up for code in this process and for programs it starts."""
    import mlflow

    place = Workspace(tmp_path)
    place.enter(monkeypatch)
    monkeypatch.delenv("MLFLOW_REGISTRY_URI", raising=False)
    before = mlflow.get_tracking_uri()
    # What another test has set in this process would go before the environment.
    monkeypatch.setattr("mlflow.tracking.fluent._active_experiment_id", None)
    mlflow.set_tracking_uri(place.tracking_uri)
    mlflow.set_registry_uri("")
    yield place
    mlflow.set_tracking_uri(before)


@contextmanager
def own_store(folder: Path) -> Iterator[Workspace]:
    """A workspace for several tests of a file: to make the tables of a store takes seconds."""
    import mlflow

    place = Workspace(folder)
    before = mlflow.get_tracking_uri()
    with pytest.MonkeyPatch.context() as patch:
        place.enter(patch)
        yield place
    mlflow.set_tracking_uri(before)


@pytest.fixture(scope="session")
def default_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, str]:
    """One run of `main` on the embedded default through `mlflow run`; its console output."""
    place = Workspace(tmp_path_factory.mktemp("default"))
    done = place.run(
        "mlflow", "run", str(ROOT), "--env-manager", "local", "--experiment-name", "phi3-mlflow",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return place, done.stdout + done.stderr


def _output(place: Workspace, step: str) -> Path:
    from phi3_mlflow.artifacts.cache import StepCache

    entry = StepCache(place.cache).latest("smollm2-135m", step)
    assert entry is not None, f"{step} left nothing"
    return entry.path


@pytest.fixture(scope="session")
def real_checkpoint(default_run: tuple[Workspace, str]) -> Path:
    """The embedded default as a Hugging Face checkpoint; only for tests marked slow."""
    return _output(default_run[0], "fetch")


@pytest.fixture(scope="session")
def real_onnx(default_run: tuple[Workspace, str]) -> Path:
    """The embedded default as an int4 ONNX directory; only for tests marked slow."""
    return _output(default_run[0], "export")
