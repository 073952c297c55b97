"""A disk that is full, really: every step that writes says so, cleans up, and succeeds later."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, Workspace

pytestmark = pytest.mark.slow

UNSHARED = ("unshare", "--map-root-user", "--mount")


def cannot_mount(folder: Path) -> str | None:
    """Why no file system can be mounted here, or None when one can."""
    command = [*UNSHARED, "mount", "-t", "tmpfs", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        return f"unshare: {error.strerror}"
    return done.stderr.strip() or "mount failed" if done.returncode else None


def test_a_full_disk_at_each_step(tmp_path: Path) -> None:
    if reason := cannot_mount(tmp_path):
        pytest.skip(f"a small file system cannot be mounted here ({reason})")
    driver = ROOT / "tests" / "fixtures" / "full_disk.py"
    done = subprocess.run(
        [*UNSHARED, sys.executable, str(driver), str(tmp_path)],
        env=Workspace(tmp_path).whole_environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout[done.stdout.index("{") :])
    for step in ("quantize", "export", "log"):
        full, after = found[f"{step} on a full disk"], found[f"{step} afterwards"]
        assert full["code"] == 1, full["said"]
        assert "no space left on" in full["said"], full["said"]
        assert "Traceback" not in full["said"], full["said"]
        assert "status=done" not in full["said"]
        assert (full["left"], full["lost"]) == ([], [])
        assert after["code"] == 0, after["said"]
        assert f"step={step} status=done cached=false" in after["said"]
