"""What a person meets at the command line: help, bad input, missing inputs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml
from click.testing import CliRunner, Result

from phi3_mlflow import __version__
from phi3_mlflow.__main__ import main as program
from phi3_mlflow.config.parameters import PARAMETERS
from phi3_mlflow.core.errors import EXIT_BAD_INPUT
from phi3_mlflow.pipeline.command_line import click_command
from phi3_mlflow.stages import catalog
from tests.conftest import ROOT, Workspace

COMMANDS = ("main", "init", "cache", "score", "serve", "verify")
STEPS = (
    "fetch",
    "train",
    "search",
    "quantize",
    "export",
    "log",
    "register",
    "evaluate",
    "promote",
    "reproduce",
)


def invoke(name: str, *options: str) -> Result:
    return CliRunner().invoke(click_command(catalog.COMMANDS[name]), list(options))


@pytest.mark.parametrize("name", [*STEPS, *COMMANDS])
def test_help_is_the_scripts_manual(name: str) -> None:
    result = invoke(name, "--help")
    assert result.exit_code == 0
    assert f"python -m steps.{name}" in result.output
    assert "--quiet" in result.output


@pytest.mark.parametrize("name", [*STEPS, "main"])
def test_an_unknown_profile_ends_with_code_2_and_names_those_there_are(
    name: str, workspace: Workspace
) -> None:
    result = invoke(name, "--profile", "nonsense")
    assert result.exit_code == EXIT_BAD_INPUT
    assert "smollm2-135m" in result.stderr
    assert "phi-3-mini-4k" in result.stderr
    assert not workspace.cache.exists()


@pytest.mark.parametrize("name", [*STEPS, "main"])
def test_an_undeclared_parameter_ends_with_code_2(name: str) -> None:
    result = invoke(name, "--colour", "blue")
    assert result.exit_code == EXIT_BAD_INPUT
    assert "--colour" in result.stderr


@pytest.mark.parametrize(
    ("name", "makes_it"),
    [("quantize", "fetch"), ("export", "quantize"), ("log", "export"), ("register", "log")],
)
def test_a_missing_input_names_the_command_that_makes_it(
    name: str, makes_it: str, workspace: Workspace
) -> None:
    result = invoke(name)
    assert result.exit_code == EXIT_BAD_INPUT
    assert f"mlflow run . -e {makes_it} -P profile=smollm2-135m" in result.stderr


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("quantize", ("--algorithm", "x"), "quantization.algorithm = 'x'"),
        ("export", ("--precision", "int3"), "precision = 'int3'"),
        ("log", ("--contract", "prompt", "--flavor", "transformers"), "needs flavor 'onnx'"),
        ("promote", ("--action", "demote"), "allowed: promote, rollback"),
        ("promote", ("--version", "latest"), "allowed are a number"),
        ("promote", ("--version", "7"), "it has: none"),
        ("promote", (), "no version of smollm2-135m carries the alias challenger"),
        ("promote", ("--action", "rollback"), "nothing to roll back"),
        ("reproduce", (), "no version of smollm2-135m carries the alias challenger"),
        ("register", ("--model-uri", "models:/m-0"), "there is no such logged model"),
        ("cache", ("--do", "clear"), "allowed: list, size, verify, prune"),
        ("cache", ("--older-than", "5", "--max-size", "much"), "write it like 12h, 30d or 8w"),
        ("cache", ("--older-than", "5", "--max-size", "much"), "write it like 500MB, 20GB"),
        ("score", (), "input has to be given"),
        ("score", ("--workers", "many", "--seed", "-1"), "workers = 'many': expected a whole"),
        ("score", ("--workers", "many", "--seed", "-1"), "seed = '-1': expected a whole number"),
        ("score", ("--master", "local[2]"), "master is for engine spark only"),
        ("score", ("--engine", "spark", "--master", "here"), "allowed are local[N], spark://"),
        ("score", ("--input", "a.csv", "--output", "b.csv"), "carries the alias champion"),
        (
            "score",
            ("--input", "a.csv", "--output", "b.csv", "--model-uri", "models:/smollm2-135m/7"),
            "model_uri = 'models:/smollm2-135m/7': smollm2-135m has no version 7; it has: none",
        ),
        ("main", ("--force", "everything"), "allowed: true, false, all, fetch"),
    ],
)
def test_bad_input_is_told_from_a_fault(
    name: str, options: tuple[str, ...], words: str, workspace: Workspace
) -> None:
    result = invoke(name, *options)
    assert result.exit_code == EXIT_BAD_INPUT, result.stderr
    assert words in result.stderr
    assert f"step={name} status=bad_input code=2" in result.stdout
    assert "Traceback" not in result.stderr


def test_mlproject_declares_just_the_parameters_that_the_steps_have() -> None:
    project = yaml.safe_load((ROOT / "MLproject").read_text())
    assert list(project["entry_points"]) == list(catalog.COMMANDS)
    assert {*STEPS, *COMMANDS} == set(catalog.COMMANDS)
    for name in project["entry_points"]:
        wanted = catalog.COMMANDS[name].parameters
        declared = project["entry_points"][name]["parameters"]
        assert tuple(declared) == wanted, name
        for parameter, about in declared.items():
            assert about == {"type": "string", "default": PARAMETERS[parameter].default}
            text = project["entry_points"][name]["command"]
            assert f"{PARAMETERS[parameter].option} {{{parameter}}}" in text


def test_the_installed_program_has_the_same_commands() -> None:
    result = CliRunner().invoke(program, ["--help"])
    assert result.exit_code == 0
    for name, command in catalog.COMMANDS.items():
        assert f"  {name}" in result.output
        told = CliRunner().invoke(program, [name, "--help"])
        assert told.exit_code == 0
        assert command.summary in told.output
    assert __version__ in CliRunner().invoke(program, ["--version"]).output


def test_a_script_runs_the_command_of_its_name() -> None:
    for name in catalog.COMMANDS:
        source = (ROOT / "steps" / f"{name}.py").read_text()
        assert f"from phi3_mlflow.stages.{name} import" in source
        assert len(source.splitlines()) < 20


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys; from phi3_mlflow.stages import catalog; "
        "print(sorted({'mlflow', 'torch', 'transformers', 'onnx', 'onnxruntime', 'pandas',"
        " 'scipy', 'matplotlib', 'datasets', 'fastapi', 'pyarrow'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
