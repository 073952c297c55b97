"""Which code runs: the commit of a checkout, or of an installed package."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from phi3_mlflow.core import git as git_module
from phi3_mlflow.core.git import Origin, git, origin
from phi3_mlflow.core.shipped import PACKAGE, checkout, shipped
from tests.conftest import ROOT


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    command = ["git", "-c", "user.name=Test", "-c", "user.email=test@example.com"]
    (tmp_path / "code").write_text("one")
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*command, *arguments], cwd=tmp_path, check=True)
    monkeypatch.setattr(git_module, "checkout", lambda: tmp_path)
    return tmp_path


def test_a_checkout_has_its_commit(repository: Path) -> None:
    found = origin()
    assert found == Origin(git(repository, "rev-parse", "HEAD") or "", None)
    git(repository, "remote", "add", "origin", "https://example.com/project.git")
    assert origin().url == "https://example.com/project.git"


def test_changes_that_are_not_committed_are_told(repository: Path) -> None:
    (repository / "code").write_text("two")
    assert origin().commit.endswith("-dirty")


def test_files_that_git_does_not_know_are_no_change(repository: Path) -> None:
    (repository / "notes").write_text("x")
    assert not origin().commit.endswith("-dirty")


def test_no_repository_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(git_module, "checkout", lambda: tmp_path)
    assert origin() == Origin("unknown")


class _Distribution:
    def __init__(self, text: str | None) -> None:
        self._text = text

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return self._text


@pytest.mark.parametrize(
    ("about", "found"),
    [
        (
            {"url": "https://example.com/p.git", "vcs_info": {"vcs": "git", "commit_id": "c0ffee"}},
            Origin("c0ffee", "https://example.com/p.git"),
        ),
        ({"url": "file:///work", "dir_info": {}}, Origin("unknown")),
        (None, Origin("unknown")),
        ([], Origin("unknown")),
    ],
)
def test_an_installed_package_has_what_pip_wrote_down(
    about: Any, found: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(git_module, "checkout", lambda: None)
    text = None if about is None else json.dumps(about)
    monkeypatch.setattr(git_module, "distribution", lambda name: _Distribution(text))
    assert origin() == found


def test_git_fails_without_an_exception(tmp_path: Path) -> None:
    assert git(tmp_path, "rev-parse", "HEAD") is None
    assert git(tmp_path / "none", "status") is None


def test_in_a_checkout_the_profiles_stand_beside_the_package() -> None:
    assert checkout() == ROOT
    assert shipped("configs") == ROOT / "configs"
    assert PACKAGE == ROOT / "phi3_mlflow"


def test_installed_they_are_inside_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from phi3_mlflow.core import shipped as module

    package = tmp_path / "site-packages" / "phi3_mlflow"
    (package / "configs").mkdir(parents=True)
    monkeypatch.setattr(module, "PACKAGE", package)
    assert shipped("configs") == package / "configs"
    assert checkout() is None
