"""The steps under a profile that asks for signatures: who signs, who refuses, with which code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from phi3_mlflow.core.errors import EXIT_BAD_INPUT, EXIT_DONE, VersionRefused
from phi3_mlflow.pipeline.command import Command
from phi3_mlflow.pipeline.command_line import click_command
from phi3_mlflow.scoring import score as scoring
from phi3_mlflow.scoring.job import ScoringJob
from phi3_mlflow.scoring.model import ScoredModel
from phi3_mlflow.stages import promote, register
from phi3_mlflow.tracking import registry
from phi3_mlflow.tracking.registry import CHAMPION
from phi3_mlflow.tracking.stored_files import LOGGED, local_files
from phi3_mlflow.trust.attestations import sign_verdict, sign_version
from tests.trust.conftest import Keys, Line
from tests.trust.test_tampering import evaluated


def profile(folder: Path, name: str, **trust: Any) -> str:
    content = {
        "description": "fake",
        "base_model": "none",
        "licence": "MIT",
        "source": "file:nowhere",
        "context_length": 256,
        "registered_model": name,
        "trust": trust,
    }
    file = folder / "fake.yaml"
    file.write_text(yaml.safe_dump(content))
    return str(file)


def run(command: Command, *arguments: str) -> Result:
    return CliRunner().invoke(click_command(command), list(arguments))


def test_promote_refuses_overruled_or_not_and_takes_what_is_signed(
    line: Line, keys: Keys, name: str, tmp_path: Path
) -> None:
    version = line.version(name)
    evaluated(version)
    file = profile(tmp_path, name, require="signature", keys=[str(keys.public)])
    for more in ((), ("--overrule", "true")):
        done = run(promote.STEP, "--profile", file, "--version", "1", *more)
        assert done.exit_code == EXIT_BAD_INPUT, done.output
        assert f"{version.uri} is refused: signature: it is not signed" in done.output
        assert registry.describe(version).tags[LOGGED] in done.output, "no way out is told"
        assert registry.alias_of(name, CHAMPION) is None
    sign_version(version, keys.signs, None)
    sign_verdict(version, keys.signs)
    done = run(promote.STEP, "--profile", file, "--version", "1")
    assert done.exit_code == EXIT_DONE, done.output
    assert registry.alias_of(name, CHAMPION) == "1"


def test_a_rollback_to_what_is_not_signed_is_refused(
    line: Line, keys: Keys, name: str, tmp_path: Path
) -> None:
    old, new = line.version(name), line.version(name)
    sign_version(new, keys.signs, None)
    registry.set_alias(new, CHAMPION)
    registry.set_tags(new, {"promoted_from": old.version})
    file = profile(tmp_path, name, require="signature", keys=[str(keys.public)])
    done = run(promote.STEP, "--profile", file, "--action", "rollback")
    assert done.exit_code == EXIT_BAD_INPUT, done.output
    assert f"{old.uri} is refused" in done.output
    assert registry.alias_of(name, CHAMPION) == new.version


def test_register_signs_a_version_from_before(
    line: Line, keys: Keys, name: str, tmp_path: Path
) -> None:
    version = line.version(name)
    model = registry.describe(version).tags[LOGGED]
    file = profile(tmp_path, name, sign_with={"key": str(keys.private)})
    done = run(register.STEP, "--profile", file, "--model-uri", model)
    assert done.exit_code == EXIT_DONE, done.output
    assert registry.describe(version).tags["signed_by"]
    assert (line.place(version) / registry.describe(version).tags["attestations"]).is_dir()
    for text in (done.output, str(registry.describe(version).tags)):
        assert str(keys.private) not in text


def test_score_refuses_before_it_loads(
    line: Line, keys: Keys, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = line.version(name)
    (tmp_path / "in.jsonl").write_text('{"prompt": "Hello"}\n')
    known = ScoredModel(local_files(version.uri), "id", False, False)
    monkeypatch.setattr(scoring, "inspect_model", lambda uri: known)
    job = ScoringJob(
        tmp_path / "in.jsonl", tmp_path / "out.jsonl", version.uri, trust=keys.required()
    )
    with pytest.raises(VersionRefused, match="it is not signed"):
        scoring.score(job)
    assert not (tmp_path / "out.jsonl").exists()
