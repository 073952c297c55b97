"""The installable package: what its wheel holds, and that it works without the checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

import phi3_mlflow
from tests.fixtures.tiny_line import write_profile


@pytest.fixture(scope="module")
def pyproject(root) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def wheel(root, tmp_path_factory) -> Path:
    """The wheel, built with the backend that is installed, so without an index."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(folder), "."]
    done = subprocess.run(build, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = folder.iterdir()
    return made


def test_dependencies_are_those_of_conda_yaml(root, tool, pyproject):
    """One list, conda.yaml's; `make lock` writes the others."""
    files, lock = tool("requirement_files"), tool("lock")
    project = pyproject["project"]
    pip = f"pip=={files.conda_pip_version()}"
    assert project["dependencies"] == [*files.conda_pip_requirements(), pip], "run `make lock`"
    extras = {
        name: files.extra_requirements(root / "requirements" / f"{name}.txt")
        for name in lock.EXTRAS
    }
    assert project["optional-dependencies"] == extras, "run `make lock`"


def test_the_build_backend_is_the_locked_one(root, pyproject):
    (backend,) = pyproject["build-system"]["requires"]
    assert backend in (root / "requirements" / "dev.txt").read_text(encoding="utf-8").split()


def test_the_python_that_is_claimed_is_the_one_that_runs_the_tests(pyproject):
    from packaging.specifiers import SpecifierSet

    claimed = SpecifierSet(pyproject["project"]["requires-python"])
    assert claimed.contains(sysconfig.get_python_version())


def test_the_version_stands_in_one_place(root, wheel):
    version = phi3_mlflow.__version__
    assert wheel.name == f"phi3_mlflow-{version}-py3-none-any.whl"
    assert f"\n## [{version}]" in (root / "CHANGELOG.md").read_text(encoding="utf-8")
    named = set()
    for path in (root / "examples").rglob("*"):
        if path.is_file() and path.suffix != ".pyc":
            text = path.read_text(encoding="utf-8")
            named |= set(re.findall(r"(?:phi3-mlflow:|\bv)(\d+\.\d+\.\d+)\b", text))
    assert named == {version}


def test_the_wheel_holds_the_package_with_its_profiles_and_data_and_nothing_else(root, wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n}
        info = {Path(n).name: archive.read(n) for n in archive.namelist() if ".dist-info/" in n}
    expected = set()
    for folder, inside in (
        ("phi3_mlflow", ""),
        ("configs", "phi3_mlflow/"),
        ("data", "phi3_mlflow/"),
        ("examples/tickets/rows", "phi3_mlflow/"),
    ):
        expected |= {
            inside + path.relative_to(root).as_posix()
            for path in (root / folder).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
    assert names == expected
    assert {"phi3_mlflow/py.typed", "phi3_mlflow/configs/smollm2-135m.yaml"} <= names
    assert b"phi3-mlflow = phi3_mlflow.__main__:main" in info["entry_points.txt"]
    assert b"License-Expression: MIT" in info["METADATA"]
    assert "LICENSE" in info


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The wheel in an environment of its own, which sees the packages of this one."""
    home = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home / "venv")], check=True)
    (packages,) = (home / "venv" / "lib").glob("python3*/site-packages")
    (packages / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = home / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-qq", "--no-deps"]
    subprocess.run([*pip, str(wheel)], check=True)
    return home


def run_installed(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    hidden = ("MLFLOW_", "PYTHONPATH", "PHI3_", "VIRTUAL_ENV")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    environment |= {
        "PHI3_MLFLOW_CACHE": str(home / "cache"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{home / 'mlflow.db'}",
    }
    command = [str(home / "venv" / "bin" / "phi3-mlflow"), *arguments]
    return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_installed_command_lists_the_steps_and_their_options(installed):
    shown = run_installed(installed, "--help")
    assert shown.returncode == 0, shown.stderr
    for step in ("main", "fetch", "quantize", "serve"):
        assert re.search(rf"^\s+{step}\b", shown.stdout, re.MULTILINE)
    shown = run_installed(installed, "fetch", "--help")
    assert shown.returncode == 0, shown.stderr
    assert "--time-limit-s" in shown.stdout
    unknown = run_installed(installed, "fetsh")
    assert unknown.returncode == 2
    assert "fetch" in unknown.stderr
    assert "Traceback" not in unknown.stderr


@pytest.mark.slow
def test_the_installed_command_finds_profiles_and_data_without_the_checkout(installed):
    shown = run_installed(installed, "main", "--dry-run", "true")
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "fetch" in shown.stdout
    wrong = run_installed(installed, "main", "--profile", "no-such", "--dry-run", "true")
    assert wrong.returncode == 2
    assert "smollm2-135m" in wrong.stderr, "it says which profiles there are"


@pytest.mark.slow
def test_the_installed_command_takes_a_model_to_the_registry(installed):
    profile = write_profile(installed)
    done = run_installed(installed, "main", "--profile", str(profile), "--quiet", "true")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("step=main status=done profile=tiny steps_done=7")
    assert len(done.stdout.splitlines()) == 1, "main's line is the one of a quiet run"
    again = run_installed(installed, "main", "--profile", str(profile))
    assert again.stdout.count(" cached=true ") == 6, again.stdout + again.stderr
