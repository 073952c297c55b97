"""A profile that follows a branch on the hub, against a server that speaks the hub's API."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from phi3_mlflow.artifacts.cache import StepCache
from phi3_mlflow.config.parameters import read_request
from phi3_mlflow.core.errors import EXIT_FAULT, EnvironmentProblem
from phi3_mlflow.sources import retrying
from phi3_mlflow.stages import fetch
from phi3_mlflow.tracking import registry
from tests.conftest import Workspace
from tests.fixtures.tiny_line import write_profile
from tests.fixtures.tiny_phi3 import make_tiny
from tests.sources.hub_server import COMMIT, REPO, HubServer

MOVED = "beef" * 10


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer(files_of(make_tiny(tmp_path / "checkpoint", "phi-4-mini"))) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    # In full precision, which saves the time to quantize.
    return write_profile(tmp_path, source=f"hf:{REPO}", track="main", precision="fp32")


def request_of(profile: Path):
    return read_request(fetch.STEP.parameters, {"profile": str(profile), "quiet": "true"})


@pytest.mark.slow
def test_a_branch_that_moved_becomes_a_version_and_the_gate_decides(
    hub: HubServer, profile: Path, workspace: Workspace, tmp_path: Path
) -> None:
    def main(*options: str) -> str:
        done = workspace.step("main", "--profile", str(profile), *options)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def versions() -> dict[str, str]:
        found = registry.client().search_model_versions("name='tiny'")
        return {str(version.version): version.tags["source_revision"] for version in found}

    main()
    assert versions() == {"1": COMMIT}
    tags = registry.describe(registry.VersionName("tiny", "1")).tags
    assert tags["source"] == f"hf:{REPO}@main"

    asked = len(hub.requests)
    assert "Nothing to do" in main()
    assert versions() == {"1": COMMIT}
    later = [request.path for request in hub.requests[asked:] if REPO in request.path]
    assert [p.partition("?")[0] for p in later] == [f"/api/models/{REPO}/revision/main"], later
    assert f"is at {COMMIT} now, as when it was fetched last" in main("--dry-run", "true")

    # The same shapes with other weights, which answer worse or better: the gate has to look.
    moved = make_tiny(tmp_path / "moved", "phi-4-mini", seed=1)
    hub.files, hub.commit = files_of(moved), MOVED
    plan = main("--dry-run", "true")
    assert f"hf:{REPO}@main is at {MOVED} now; fetched last: {COMMIT}" in plan
    assert "fetch     would run: changed: settings.source_revision; needs 1 MB of download" in plan
    assert versions() == {"1": COMMIT}

    main()
    assert versions() == {"1": COMMIT, "2": MOVED}
    tags = registry.describe(registry.VersionName("tiny", "2")).tags
    assert tags["gate"] == "passed"
    assert tags[registry.GATE_AGAINST] == "1"
    champion = "2" if tags["gate_decision"] == "promote" else "1"
    assert registry.alias_of("tiny", "champion") == champion
    assert registry.alias_of("tiny", "challenger") == "2"


def test_a_hub_that_does_not_answer_changes_nothing(
    hub: HubServer, profile: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_of(profile)
    assert fetch.followed(request) == {fetch.REVISION: COMMIT}
    hub.close()
    monkeypatch.setattr(retrying.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(retrying.RetryPolicy, "__init__", impatient(retrying.RetryPolicy.__init__))
    with pytest.raises(EnvironmentProblem) as caught:
        fetch.followed(request)
    assert caught.value.exit_code == EXIT_FAULT
    assert f"where the branch main of {REPO} is" in str(caught.value)
    assert "the champion stay as they are" in str(caught.value)
    assert StepCache().entries() == []


def impatient(init):
    def patched(self, **values):
        init(self, **{"attempts": 2, "first_wait_s": 0.0, **values})

    return patched


def test_main_hands_on_what_it_was_told(hub: HubServer, profile: Path) -> None:
    request = request_of(profile)
    told = fetch.followed(request)
    hub.commit = MOVED
    handed = replace(request, results=told)
    assert fetch.STEP.settings(handed)["source_revision"] == COMMIT
    assert fetch.STEP.settings(request)["source_revision"] == MOVED


def test_a_pinned_source_asks_nobody(hub: HubServer, tmp_path: Path) -> None:
    request = request_of(write_profile(tmp_path, "pinned", source=f"hf:{REPO}@{COMMIT}"))
    assert fetch.followed(request) == {}
    assert fetch.where(request, {}) is None
    assert hub.requests == []


def test_a_parameter_pins_what_the_profile_follows(hub: HubServer, profile: Path) -> None:
    values = {"profile": str(profile), "source": f"hf:{REPO}@{COMMIT}"}
    request = read_request(fetch.STEP.parameters, values)
    assert request.profile.origin == f"hf:{REPO}@{COMMIT}"
