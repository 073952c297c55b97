"""conda.yaml and its lock: what every env manager of MLflow makes of them."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import logging
import os
import re
import stat
import sys
from pathlib import Path

import pytest
import yaml

PIN = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9.!_-]*)$")

# In conda.yaml without being imported by name, and why.
NOT_IMPORTED = {
    "accelerate": "MLflow's transformers flavor loads a model with it",
    "pyopenssl": "model-signing imports it, and does not name it among its requirements",
}
# Imported where the feature is used, and installed for that feature alone.
OPTIONAL = {"optimum", "gptqmodel", "pyspark"}


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def conda(root: Path) -> dict:
    return yaml.safe_load((root / "conda.yaml").read_text(encoding="utf-8"))


def pip_list(root: Path) -> list[str]:
    (section,) = (entry for entry in conda(root)["dependencies"] if isinstance(entry, dict))
    return section["pip"]


def pins(lines: list[str]) -> dict[str, str]:
    """Name to version of requirement lines, each of which must be an exact pin."""
    found = {}
    for line in lines:
        match = PIN.match(line)
        assert match, f"not an exact pin: {line}"
        assert normalized(match.group(1)) not in found, f"twice: {line}"
        found[normalized(match.group(1))] = match.group(2)
    return found


def direct_pins(root: Path) -> dict[str, str]:
    return pins([line for line in pip_list(root) if not line.startswith("-c ")])


def constraints(root: Path, name: str = "constraints.txt") -> dict[str, str]:
    text = (root / "requirements" / name).read_text(encoding="utf-8")
    return pins([line for line in text.splitlines() if line and not line.startswith("#")])


def extra(root: Path, name: str) -> dict[str, str]:
    text = (root / "requirements" / name).read_text(encoding="utf-8")
    return pins([line for line in text.splitlines() if line and not line.startswith("#")])


def imported_modules(folders: list[Path]) -> dict[str, str]:
    """Top-level modules imported anywhere in the folders' scripts, each with one place."""
    found: dict[str, str] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                    names = [node.module]
                for name in names:
                    found.setdefault(name.partition(".")[0], f"{path.name}:{node.lineno}")
    # _typeshed is the type checker's own: there is no such module when a program runs.
    ours = {"phi3_mlflow", "steps", "_typeshed"}
    return {n: w for n, w in found.items() if n not in sys.stdlib_module_names and n not in ours}


def test_mlflow_keeps_all_of_conda_yaml_for_uv_and_virtualenv(root, caplog):
    from mlflow.utils.environment import _PythonEnv

    with caplog.at_level(logging.WARNING, logger="mlflow"):
        env = _PythonEnv.from_conda_yaml(root / "conda.yaml")
    assert not caplog.records, "MLflow dropped something of conda.yaml"
    assert env.python == "3.11"
    assert env.build_dependencies == [f"pip=={constraints(root)['pip']}"]
    assert env.dependencies == pip_list(root)


def test_mlflow_names_an_environment_after_the_whole_closure(root, tmp_path):
    """A changed lock must not find the environment of the old one, in any env manager."""
    from mlflow.utils.conda import _get_conda_env_name
    from mlflow.utils.environment import _PythonEnv
    from mlflow.utils.virtualenv import _get_virtualenv_name

    (tmp_path / "requirements").mkdir()
    lock = tmp_path / "requirements" / "constraints.txt"
    text = (root / "requirements" / "constraints.txt").read_text(encoding="utf-8")
    lock.write_text(text)
    (tmp_path / "conda.yaml").write_text((root / "conda.yaml").read_text(encoding="utf-8"))
    env = _PythonEnv.from_conda_yaml(tmp_path / "conda.yaml")
    before = _get_virtualenv_name(env, tmp_path)
    lock.write_text(re.sub(r"(?m)^certifi==.*$", "certifi==1.0", text))
    assert _get_virtualenv_name(env, tmp_path) != before
    # conda's name comes from conda.yaml alone, so the closure's hash is written into it.
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert f"# closure: sha256:{digest}\n" in (root / "conda.yaml").read_text(encoding="utf-8")
    assert _get_conda_env_name(root / "conda.yaml").startswith("mlflow-")


def test_pip_reads_the_list_and_its_constraints(root):
    """Env managers write the pip list as a requirements file beside conda.yaml."""
    from pip._internal.network.session import PipSession
    from pip._internal.req.req_file import parse_requirements

    listed = root / f".requirements-{os.getpid()}.txt"
    listed.write_text("\n".join(pip_list(root)))
    try:
        parsed = list(parse_requirements(str(listed), session=PipSession()))
    finally:
        listed.unlink()
    asked = {normalized(p.requirement.partition("==")[0]) for p in parsed if not p.constraint}
    bound = {normalized(p.requirement.partition("==")[0]) for p in parsed if p.constraint}
    assert asked == set(direct_pins(root))
    assert bound == set(constraints(root))


def test_conda_yaml_is_an_environment_file_that_conda_takes(root):
    """The keys and forms of conda's environment files, as `conda env create --file` reads them."""
    content = conda(root)
    assert set(content) == {"name", "channels", "dependencies"}
    assert re.fullmatch(r"[A-Za-z0-9._-]+", content["name"])
    assert content["channels"] == ["conda-forge"]
    specs = [entry for entry in content["dependencies"] if isinstance(entry, str)]
    assert specs == ["python=3.11", f"pip={constraints(root)['pip']}"]
    sections = [entry for entry in content["dependencies"] if not isinstance(entry, str)]
    assert [list(section) for section in sections] == [["pip"]]
    # conda installs a pip section with the pip it was told to install: it must come with one.
    assert any(spec.startswith("pip=") for spec in specs)


def test_what_conda_is_asked_to_do(root, tmp_path, monkeypatch):
    """A stand-in for conda records the calls that MLflow's conda env manager makes."""
    from mlflow.utils.conda import _get_conda_env_name, get_or_create_conda_env

    calls = tmp_path / "calls"
    stub = tmp_path / "bin" / "conda"
    stub.parent.mkdir()
    stub.write_text(
        "#!/bin/sh\n"
        f'echo "$@" >> "{calls}"\n'
        'if [ "$1 $2" = "env list" ]; then echo "{\\"envs\\": []}"; fi\n'
    )
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("MLFLOW_CONDA_HOME", str(tmp_path))
    monkeypatch.delenv("CONDA_EXE", raising=False)
    environment = get_or_create_conda_env(str(root / "conda.yaml"))
    name = _get_conda_env_name(root / "conda.yaml")
    assert f"env create -n {name} --file {root / 'conda.yaml'}" in calls.read_text().splitlines()
    assert f"conda activate {name}" in " ".join(environment.get_activate_command())


def test_every_direct_dependency_is_pinned_as_in_the_closure(root):
    closure = constraints(root)
    for name, version in direct_pins(root).items():
        assert closure.get(name) == version, f"{name}: run `make lock`"


@pytest.mark.parametrize("name", ["dev", "gptq", "spark"])
def test_optional_requirements_are_pinned_as_in_their_closure(root, name):
    closure = constraints(root) | constraints(root, f"constraints-{name}.txt")
    for package, version in extra(root, f"{name}.txt").items():
        assert closure.get(package) == version, f"{package}: run `make lock`"
    overlap = set(constraints(root)) & set(constraints(root, f"constraints-{name}.txt"))
    assert not overlap, "bound twice"


def test_the_locks_were_made_for_these_requirements(root, tool):
    lock, files = tool("lock"), tool("requirement_files")
    for kind, name in (
        ("runtime", "constraints.txt"),
        ("dev", "constraints-dev.txt"),
        ("gptq", "constraints-gptq.txt"),
        ("spark", "constraints-spark.txt"),
    ):
        digest = lock.requirements_digest(files.direct_requirements(kind))
        text = (root / "requirements" / name).read_text(encoding="utf-8")
        assert f"# requirements: sha256:{digest}\n" in text, f"{name} fell behind: run `make lock`"


def test_the_closure_has_no_hole(root):
    """Whatever an installed package of the closure requires here is in the closure too."""
    from packaging.requirements import Requirement

    closure = constraints(root)
    missing = set()
    for name in direct_pins(root):
        waiting, seen = [name], set()
        while waiting:
            package = waiting.pop()
            if package in seen:
                continue
            seen.add(package)
            if package not in closure:
                missing.add(package)
                continue
            for text in importlib.metadata.requires(package) or []:
                requirement = Requirement(text)
                if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                    waiting.append(normalized(requirement.name))
    assert not missing


def test_line_by_line_reading_of_conda_yaml_agrees_with_yaml(root, tool):
    files = tool("requirement_files")
    assert files.conda_pip_requirements() == [
        line for line in pip_list(root) if not line.startswith("-")
    ]
    assert f"pip={files.conda_pip_version()}" in conda(root)["dependencies"]


def test_every_import_is_a_direct_dependency(root):
    providers = importlib.metadata.packages_distributions()
    direct = set(direct_pins(root))
    undeclared = {}
    for module, where in imported_modules([root / "phi3_mlflow", root / "steps"]).items():
        names = {normalized(name) for name in providers.get(module, [module])}
        if not names & (direct | OPTIONAL):
            undeclared[module] = where
    assert not undeclared, "add NAME==VERSION to conda.yaml's pip list, then `make lock`"
    assert set(extra(root, "gptq.txt")) | set(extra(root, "spark.txt")) == OPTIONAL


def test_every_direct_dependency_is_needed(root):
    providers = importlib.metadata.packages_distributions()
    used = {
        normalized(name)
        for module in imported_modules([root / "phi3_mlflow", root / "steps"])
        for name in providers.get(module, [module])
    }
    assert set(direct_pins(root)) - used == set(NOT_IMPORTED)


def test_no_file_names_a_package_index(root):
    names = re.compile(r"(?i)\b(files\.pythonhosted|pypi)\.org\b")
    for path in [root / "conda.yaml", root / "Makefile", *(root / "requirements").iterdir()]:
        assert not names.search(path.read_text(encoding="utf-8")), path.name
