"""MLproject against MLflow's parser, the scripts it starts and the list of parameters."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
ENTRY_POINTS = tuple(yaml.safe_load((ROOT / "MLproject").read_text("utf-8"))["entry_points"])
STEPS = {"main", "fetch", "quantize", "export", "log", "register", "evaluate", "promote"}


@pytest.fixture(scope="module")
def project(root):
    from mlflow.projects._project_spec import load_project

    return load_project(str(root))


@pytest.fixture(scope="module")
def declared(root) -> dict:
    return yaml.safe_load((root / "MLproject").read_text(encoding="utf-8"))["entry_points"]


def test_mlflow_reads_the_project(project, root):
    assert project.name == "phi3-mlflow"
    assert project.env_config_path == str(root / "conda.yaml")
    assert project.docker_env is None
    assert set(ENTRY_POINTS) >= STEPS
    for name in ENTRY_POINTS:
        assert project.get_entry_point(name).command


def test_every_script_is_an_entry_point_and_has_a_manual(declared, root):
    scripts = {p.stem for p in (root / "steps").glob("*.py") if not p.stem.startswith("_")}
    assert scripts == set(declared)
    for name in scripts:
        source = (root / "steps" / f"{name}.py").read_text(encoding="utf-8")
        assert ast.get_docstring(ast.parse(source)), f"steps/{name}.py has no docstring"


def test_commands_start_a_script_with_every_declared_parameter(declared):
    for name, entry in declared.items():
        words = entry["command"].split()
        assert words[:3] == ["python", "-m", f"steps.{name}"]
        expected = []
        for parameter in entry["parameters"]:
            expected += ["--" + parameter.replace("_", "-"), "{" + parameter + "}"]
        assert words[3:] == expected, f"{name}: an option a parameter, in the order declared"


def test_parameters_have_the_types_and_defaults_of_the_list(declared):
    from phi3_mlflow.config.parameters import PARAMETERS

    for name, entry in declared.items():
        for parameter, spec in entry["parameters"].items():
            where = f"{name}.{parameter}"
            assert set(spec) == {"type", "default"}, where
            # `path` would make MLflow resolve a value before the step sees it, and copy URIs.
            assert spec["type"] == "string", where
            # MLproject has no booleans and no nulls: unquoted, they arrive as False and None.
            assert isinstance(spec["default"], str), where
            assert spec["default"] == PARAMETERS[parameter].default, where


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_a_script_takes_the_options_that_mlproject_gives_it(declared, root, name):
    shown = subprocess.run(
        [sys.executable, "-m", f"steps.{name}", "--help"],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    options = set(re.findall(r"^  (--[a-z0-9-]+)", shown, re.MULTILINE)) - {"--help"}
    assert options == {"--" + p.replace("_", "-") for p in declared[name]["parameters"]}


@settings(max_examples=50)
@given(value=st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1))
def test_no_value_leaves_its_place_in_the_shell(project, declared, value):
    """MLflow quotes values: whatever a caller gives arrives as one argument."""
    for name in declared:
        entry = project.get_entry_point(name)
        first = next(iter(entry.parameters))
        command = shlex.split(entry.compute_command({first: value}, None))
        assert command[4] == value
        assert len(command) == 3 + 2 * len(entry.parameters)
