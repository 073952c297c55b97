"""The entry point `verify`: what it takes, its table, its JSON, its codes."""

from __future__ import annotations

import json
from pathlib import Path

import mlflow
import pytest
from click.testing import CliRunner, Result

from phi3_mlflow.core.errors import EXIT_BAD_INPUT, EXIT_DIFFERENT, EXIT_DONE, NotReproduced
from phi3_mlflow.pipeline.command_line import click_command
from phi3_mlflow.stages import verify
from phi3_mlflow.tracking import registry
from phi3_mlflow.tracking.registry import VersionName
from phi3_mlflow.tracking.stored_files import LOGGED
from phi3_mlflow.trust.attestations import sign_version
from tests.trust.conftest import FILES, Keys, Line
from tests.trust.test_tampering import flip, remove


def run(*arguments: str) -> Result:
    return CliRunner().invoke(click_command(verify.COMMAND), list(arguments))


@pytest.fixture
def signed(line: Line, keys: Keys, name: str) -> VersionName:
    version = line.version(name)
    sign_version(version, keys.signs, "run")
    return version


def test_a_signed_version(signed: VersionName, keys: Keys, tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    done = run("--model-uri", signed.uri, "--keys", str(keys.public), "--output", str(found))
    assert done.exit_code == EXIT_DONE, done.output
    content = json.loads(found.read_text())
    states = {check["name"]: check["state"] for check in content["checks"]}
    assert states == {
        "files": "ok", "signature": "ok", "provenance": "ok", "registry": "ok", "recipe": "ok",
    }  # fmt: skip
    assert content["verified"] is True
    assert content["model"] == signed.uri
    assert "step=verify status=done" in done.output
    assert "signed=true" in done.output
    count = len(FILES) + 2  # MLmodel and manifest.json
    assert f"signature   ok      {count} files, signed by" in done.output


def test_what_does_not_verify_ends_with_code_4_and_names_each_file(
    line: Line, signed: VersionName, keys: Keys, tmp_path: Path
) -> None:
    flip("runtime/engine.py")(line.place(signed))
    remove(line.place(signed))
    found = tmp_path / "found.json"
    done = run("--model-uri", signed.uri, "--keys", str(keys.public), "--output", str(found))
    assert done.exit_code == EXIT_DIFFERENT
    assert "step=verify status=different code=4" in done.output
    content = json.loads(found.read_text())
    assert content["verified"] is False
    (check,) = (one for one in content["checks"] if one["name"] == "signature")
    assert len(check["details"]) == 2
    for line_ in check["details"]:
        assert line_ in done.output


def test_a_downloaded_folder_and_a_logged_model(
    signed: VersionName, keys: Keys, others: Keys, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    mlflow.artifacts.download_artifacts(artifact_uri=signed.uri, dst_path=str(copy))
    model = registry.describe(signed).tags[LOGGED]
    for place in (str(copy), model):
        done = run("--model-uri", place, "--keys", str(keys.public))
        assert done.exit_code == EXIT_DONE, done.output
        assert signed.uri in done.output
        done = run("--model-uri", place, "--keys", str(others.public))
        assert done.exit_code == EXIT_DIFFERENT, done.output
        assert "signed with the key" in done.output


def test_without_keys_the_files_are_checked_and_the_rest_is_said_to_be_unchecked(
    signed: VersionName, line: Line
) -> None:
    done = run("--model-uri", signed.uri)
    assert done.exit_code == EXIT_DONE, done.output
    assert "signature   -       no key was given" in done.output
    assert "signed=false" in done.output
    unsigned = line.version(signed.name)
    assert "it is not signed" in run("--model-uri", unsigned.uri).output


def test_unsigned_fails_where_keys_are_given(line: Line, keys: Keys, name: str) -> None:
    done = run("--model-uri", line.version(name).uri, "--keys", str(keys.public))
    assert done.exit_code == EXIT_DIFFERENT
    assert "it is not signed" in done.output


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--model-uri", "models:/nobody/1"), "nobody has no version 1"),
        (("--model-uri", "no/such/folder"), "there is no such folder"),
        (("--model-uri", "models:/m-0123456789abcdef0123456789abcdef"), "no such model"),
        (("--keys", "/no/such/key", "--model-uri", "."), "/no/such/key cannot be read"),
        (("--model-uri", ".", "--rebuild", "true"), "only such a one can be made again"),
        (("--rebuild", "maybe"), "allowed: true, false"),
    ],
)
def test_bad_input(arguments: tuple[str, ...], told: str, store) -> None:
    done = run(*arguments)
    assert done.exit_code == EXIT_BAD_INPUT, done.output
    assert told in done.output


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    done = run("--model-uri", str(tmp_path))
    assert done.exit_code == EXIT_DIFFERENT
    assert "it has no file MLmodel" in done.output


def test_rebuild_is_reproduce_and_only_of_what_is_not_suspect(
    line: Line, signed: VersionName, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def again(step, request) -> None:
        asked.append((step.name, request.value("version")))
        if len(asked) > 1:
            raise NotReproduced("models:/x/1 did not come out the same: 1 of 2 files\n  - a: b")

    monkeypatch.setattr(verify, "carry_out", again)
    arguments = ("--model-uri", signed.uri, "--keys", str(keys.public), "--rebuild", "true")
    done = run(*arguments)
    assert done.exit_code == EXIT_DONE, done.output
    assert asked == [("reproduce", signed.uri)]
    assert "rebuild     ok" in done.output
    done = run(*arguments)
    assert done.exit_code == EXIT_DIFFERENT
    assert "did not come out the same" in done.output
    flip("MLmodel")(line.place(signed))
    done = run(*arguments)
    assert done.exit_code == EXIT_DIFFERENT
    assert len(asked) == 2, "the recipe of a changed model was run"
