"""Moving the alias `champion`: what may, what may not, and two at once on SQLite and PostgreSQL."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from phi3_mlflow.core.errors import EXIT_BAD_INPUT, EnvironmentProblem, GateRefused, UserError
from phi3_mlflow.tracking import promotion, registry
from phi3_mlflow.tracking.promotion import promote, rollback
from phi3_mlflow.tracking.registry import CHAMPION, VersionName
from tests.conftest import ROOT, Workspace
from tests.fixtures.postgres import missing_postgres, running_postgres

NAME = "m"
PASSED = {"gate": "passed", "gate_decision": "promote", "gate_against": "none"}


def version(number: int) -> VersionName:
    return VersionName(NAME, str(number))


def add(*tags: dict[str, str]) -> None:
    """Registered versions, numbered from 1, with these tags."""
    client = registry.client()
    client.create_registered_model(NAME)
    for each in tags:
        client.create_model_version(NAME, source="nowhere", tags=each)


def champion() -> str | None:
    return registry.alias_of(NAME, CHAMPION)


@pytest.mark.usefixtures("workspace")
class TestOneAtATime:
    def test_a_passed_version_becomes_champion_and_says_why(self) -> None:
        add({**PASSED, "gate_reasons": "all thresholds are kept"})
        done = promote(version(1), overrule=False)
        assert (done.moved, champion()) == (True, "1")
        tags = registry.describe(version(1)).tags
        assert tags["promotion_reason"] == "all thresholds are kept"
        assert tags["promotion_forced"] == "false"
        assert tags["promoted_from"] == ""
        assert "@" in tags["promoted_by"]
        assert tags["promoted_at"].startswith("20")
        assert promotion.CLAIM not in registry.client().get_registered_model(NAME).tags

    def test_what_was_not_gated_becomes_champion_and_is_recorded_as_such(self) -> None:
        not_gated = {**PASSED, "gate": "not gated", "gate_reasons": "not gated: switched off"}
        add(PASSED, not_gated)
        promote(version(1), overrule=False)
        assert promote(version(2), overrule=False).moved
        tags = registry.describe(version(2)).tags
        assert tags["promotion_reason"] == "not gated: switched off"
        assert tags["promotion_forced"] == "false", "it was switched off, not overruled"

    def test_again_changes_nothing(self) -> None:
        add(PASSED)
        promote(version(1), overrule=False)
        before = registry.describe(version(1)).tags
        assert not promote(version(1), overrule=False).moved
        assert registry.describe(version(1)).tags == before

    def test_the_same_model_again_changes_nothing(self) -> None:
        same = {"artifact_sha256": "ab" * 32}
        add({**PASSED, **same}, {**PASSED, **same})
        promote(version(1), overrule=False)
        done = promote(version(2), overrule=False)
        assert (done.moved, champion()) == (False, "1")
        assert "the same model" in done.reason

    def test_what_failed_is_refused_and_forcing_is_recorded(self) -> None:
        add(PASSED, {"gate": "failed", "gate_reasons": "kl_mean is 9"})
        promote(version(1), overrule=False)
        with pytest.raises(GateRefused, match=r"stays with version 1\.\nkl_mean is 9"):
            promote(version(2), overrule=False)
        assert champion() == "1"
        promote(version(2), overrule=True)
        tags = registry.describe(version(2)).tags
        assert (champion(), tags["promotion_forced"], tags["promoted_from"]) == ("2", "true", "1")
        assert rollback(NAME).champion == version(1)
        assert champion() == "1"
        with pytest.raises(UserError, match="none before it"):
            rollback(NAME)

    def test_a_verdict_on_another_champion_does_not_count(self) -> None:
        add(PASSED, PASSED)
        promote(version(1), overrule=False)
        with pytest.raises(UserError, match=r"compared with no champion.*now version 1"):
            promote(version(2), overrule=False)
        registry.set_tags(version(2), {"gate_against": "1"})
        assert promote(version(2), overrule=False).moved

    def test_a_version_that_nothing_speaks_for_leaves_the_champion(self) -> None:
        keep = {"gate_decision": "keep", "gate_against": "1", "gate_reasons": "chance"}
        add(PASSED, {**PASSED, **keep})
        promote(version(1), overrule=False)
        done = promote(version(2), overrule=False)
        assert (done.moved, done.champion, champion()) == (False, version(1), "1")
        assert "chance" in done.reason

    def test_a_champion_is_compared_with_the_one_before_it(self) -> None:
        add(PASSED, {**PASSED, "gate_against": "1"})
        assert registry.champion_to_beat(version(1)) is None
        promote(version(1), overrule=False)
        assert registry.champion_to_beat(version(1)) is None
        assert registry.champion_to_beat(version(2)) == version(1)
        promote(version(2), overrule=False)
        assert registry.champion_to_beat(version(2)) == version(1)

    def test_an_alias_that_moved_meanwhile_is_not_moved_over(self) -> None:
        add(PASSED, PASSED, PASSED)
        registry.set_alias(version(3), CHAMPION)
        with pytest.raises(EnvironmentProblem, match="moved from version 1 to 3"):
            promotion._move(version(2), "1", "late", forced=False)
        assert champion() == "3"
        assert "promoted_at" not in registry.describe(version(2)).tags

    def test_the_claim_of_someone_who_died_is_void(self) -> None:
        add(PASSED)
        client = registry.client()
        client.set_registered_model_tag(NAME, promotion.CLAIM, f"dead {time.time() - 3600}")
        assert promote(version(1), overrule=False).moved

    def test_a_claim_is_waited_for_and_given_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        add(PASSED)
        registry.client().set_registered_model_tag(NAME, promotion.CLAIM, f"x {time.time() + 60}")
        monkeypatch.setattr(promotion, "_CLAIM_SECONDS", 0.1)
        with pytest.raises(EnvironmentProblem, match="others are promoting"):
            promote(version(1), overrule=False)
        assert champion() is None


# --- two at once ------------------------------------------------------------------------------

PROMOTE = """
import sys, time
from pathlib import Path
from phi3_mlflow.tracking import promotion, registry
from phi3_mlflow.pipeline.command_line import guarded
version = registry.VersionName("m", sys.argv[1])
registry.describe(version)  # connected, and everything imported
Path(sys.argv[3]).touch()
while not Path(sys.argv[4]).exists():
    time.sleep(0.005)
sys.exit(guarded("promote", lambda: promotion.promote(version, overrule=sys.argv[2] == "overrule")))
"""


def at_once(
    place: Workspace, uri: str, numbers: tuple[int, ...], how: str
) -> list[tuple[int, str]]:
    """Promote versions at the same moment, each as if on a machine of its own (no shared lock).

    Returns:
        Exit code and error output of each.
    """
    folder = place.folder / how
    folder.mkdir()
    running = []
    for number in numbers:
        environment = {
            **os.environ,
            "PHI3_MLFLOW_CACHE": str(folder / f"machine{number}"),
            "MLFLOW_TRACKING_URI": uri,
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "-c", PROMOTE, str(number), how]
        command += [str(folder / f"ready{number}"), str(folder / "go")]
        running.append(
            subprocess.Popen(
                command, env=environment, cwd=place.folder, stderr=subprocess.PIPE, text=True
            )
        )
    deadline = time.monotonic() + 120
    while not all((folder / f"ready{number}").exists() for number in numbers):
        assert time.monotonic() < deadline, "the processes did not get ready"
        assert all(process.poll() is None for process in running), "a process ended early"
        time.sleep(0.02)
    (folder / "go").touch()
    errors = [process.communicate(timeout=120)[1] for process in running]
    return [(process.returncode, error) for process, error in zip(running, errors, strict=True)]


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """A PostgreSQL server of this test's own; the URI of an empty database."""
    if reason := missing_postgres():
        pytest.skip(reason)
    with running_postgres() as uri:
        yield uri


@pytest.mark.slow
@pytest.mark.parametrize("database", ["sqlite", "postgres"])
def test_two_promotions_at_once(
    database: str,
    workspace: Workspace,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uri = workspace.tracking_uri
    if database == "postgres":
        uri = request.getfixturevalue("postgres")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    add(PASSED, *({**PASSED, "gate_against": "1"} for _ in range(4)))
    promote(version(1), overrule=False)

    # Both were better than version 1. One takes its place; the other is told that it was not
    # compared with the champion there is now.
    ends = at_once(workspace, uri, (2, 3), "judged")
    assert sorted(code for code, _ in ends) == [0, EXIT_BAD_INPUT], ends
    winner = next(n for n, (code, _) in zip((2, 3), ends, strict=True) if code == 0)
    loser = 5 - winner
    assert champion() == str(winner)
    assert registry.describe(version(winner)).tags["promoted_from"] == "1"
    assert "promoted_at" not in registry.describe(version(loser)).tags
    told = next(error for code, error in ends if code)
    assert f"now version {winner}" in told
    assert "Traceback" not in told

    # Both are forced: one after the other, and the way back leads through both.
    ends = at_once(workspace, uri, (4, 5), "overrule")
    assert [code for code, _ in ends] == [0, 0], ends
    last = champion()
    other = "4" if last == "5" else "5"
    assert registry.describe(VersionName(NAME, str(last))).tags["promoted_from"] == other
    assert registry.describe(VersionName(NAME, other)).tags["promoted_from"] == str(winner)
    assert promotion.CLAIM not in registry.client().get_registered_model(NAME).tags
    assert rollback(NAME).champion == VersionName(NAME, other)


@pytest.mark.usefixtures("workspace")
class TestRegistering:
    def test_an_alias_goes_to_later_versions_only_by_itself(self) -> None:
        add({}, {}, {})
        assert registry.advance_alias(version(2), "challenger") is None
        assert registry.advance_alias(version(1), "challenger") == "2"
        assert registry.alias_of(NAME, "challenger") == "2"
        assert registry.advance_alias(version(3), "challenger") is None
        assert registry.advance_alias(version(3), "challenger") is None
        assert registry.alias_of(NAME, "challenger") == "3"

    def test_the_same_content_makes_one_version(self, tmp_path: Path) -> None:
        import mlflow

        file = tmp_path / "model.py"
        file.write_text(
            "import mlflow\n\nclass Echo(mlflow.pyfunc.PythonModel):\n"
            "    def predict(self, context, model_input, params=None):\n"
            "        return model_input\n\nmlflow.models.set_model(Echo())\n"
        )

        def logged(content: str) -> str:
            model = mlflow.pyfunc.log_model(name="x", python_model=str(file), pip_requirements=[])
            tags = {registry.CONTENT: content}
            return registry.register(f"models:/{model.model_id}", NAME, tags, "words").version

        assert [logged("a"), logged("a"), logged("b"), logged("a")] == ["1", "1", "2", "1"]
        registry.client().delete_logged_model(registry.logged_model_id(version(1)))
        assert logged("a") == "3"
