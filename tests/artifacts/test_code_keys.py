"""The keys of the step cache follow the code: nothing that decides an output can be left out."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3_mlflow.artifacts import code_keys
from phi3_mlflow.artifacts.code_keys import NEUTRAL_LIBRARIES, NEUTRAL_MODULES, SOURCE, closure
from phi3_mlflow.core.shipped import PACKAGE
from tests.conftest import ROOT, Workspace
from tests.fixtures.tiny_line import write_profile

STEPS = (
    "fetch", "train", "search", "quantize", "export", "log", "register", "evaluate", "promote",
    "reproduce",
)  # fmt: skip


def roots(step: str) -> tuple[str, ...]:
    name = f"phi3_mlflow.stages.{step}"
    return (name, *importlib.import_module(name).STEP.copies)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The packages' sources in a folder where they may be changed."""
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name)
    return tmp_path


def hashes(step: str, source: Path) -> dict[str, str]:
    """What a step's key holds of the code, read anew."""
    code_keys._sha256.cache_clear()
    return closure(roots(step), source).hashes(source)


@pytest.mark.parametrize("step", STEPS)
def test_touching_what_a_step_runs_changes_its_key_and_nothing_else_does(
    step: str, copied: Path
) -> None:
    before = hashes(step, copied)
    assert f"phi3_mlflow/stages/{step}.py" in before
    for file in sorted(copied.rglob("*")):
        if not file.is_file() or file.suffix == ".pyc":
            continue
        name = file.relative_to(copied).as_posix()
        text = file.read_bytes()
        file.write_bytes(text + b"\n")
        changed = {path for path, digest in hashes(step, copied).items() if digest != before[path]}
        assert changed == ({name} if name in before else set())
        file.write_bytes(text)


def test_export_follows_the_packing_that_it_shares_with_quantize() -> None:
    """The fault that lists kept by hand had: a stale ONNX model beside fresh int4 weights."""
    export, quantize = closure(roots("export")).modules, closure(roots("quantize")).modules
    for module in ("packing", "rounding", "plan"):
        assert f"phi3_mlflow.quantization.{module}" in export
        assert f"phi3_mlflow.quantization.{module}" in quantize
    assert "phi3_mlflow.evaluation.measure" in closure(roots("search")).modules
    assert "phi3_mlflow.stages.card" in closure(roots("log")).modules
    assert "phi3_mlflow.artifacts.provenance" in export


def test_what_is_copied_into_a_logged_model_counts() -> None:
    counted = closure(roots("log")).files
    runtime = SOURCE / "phi3_mlflow" / "runtime"
    copied = [*runtime.glob("*.py"), *(SOURCE / "phi3_mlflow" / "flavors").glob("*_model.py")]
    assert {file.relative_to(SOURCE).as_posix() for file in copied} <= {*counted}


def test_a_template_beside_a_module_counts() -> None:
    assert "phi3_mlflow/evaluation/report/report.html.j2" in closure(roots("evaluate")).files


def test_every_neutral_name_exists_and_has_a_reason() -> None:
    for name, reason in NEUTRAL_MODULES.items():
        assert code_keys._file_of(name, SOURCE), name
        assert len(reason) > 10
    assert all(len(reason) > 10 for reason in NEUTRAL_LIBRARIES.values())


def test_every_imported_library_is_known_by_its_distribution() -> None:
    """`version_of` asks by the distribution's name; a wrong one would read "not installed"."""
    known = packages_distributions()
    imported = {
        library
        for step in STEPS
        for module in closure(roots(step)).modules
        for library in code_keys._read(module, SOURCE).libraries
    }
    assert len(imported) > 10
    for library in imported & known.keys():
        names = {name.replace("_", "-").lower() for name in known[library]}
        assert code_keys.distribution(library).lower() in names, library


@pytest.mark.parametrize(
    ("source", "package", "found"),
    [
        ("import a.b", "p", ["a.b"]),
        ("from a import b, c as d", "p", ["a.b", "a.c"]),
        ("from . import b", "p.q", ["p.q.b"]),
        ("from ..r import b", "p.q", ["p.r.b"]),
        ("def f():\n    import a", "p", ["a"]),
        ("if TYPE_CHECKING:\n    import a\nelse:\n    import b", "p", ["b"]),
        ("if typing.TYPE_CHECKING:\n    import a", "p", []),
        ("try:\n    import a\nexcept ImportError:\n    import b", "p", ["a", "b"]),
        ("class A:\n    def f(self):\n        from a.b import c", "p", ["a.b.c"]),
    ],
)
def test_imports_are_found_wherever_they_stand(source: str, package: str, found: list[str]) -> None:
    import ast

    assert list(code_keys._imports(ast.parse(source), package)) == found


@given(st.dictionaries(st.sampled_from("abcdef"), st.sets(st.sampled_from("abcdef")), min_size=1))
def test_a_closure_is_everything_that_can_be_reached(imports: dict[str, set[str]]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "phi3_mlflow"
        package.mkdir()
        for name in "abcdef":
            lines = [f"from phi3_mlflow import {other}" for other in imports.get(name, ())]
            (package / f"{name}.py").write_text("\n".join(lines))
        (package / "__init__.py").write_text("")
        reached = {"a"}
        while more := {o for name in reached for o in imports.get(name, ())} - reached:
            reached |= more
        found = closure(("phi3_mlflow.a",), Path(folder)).modules
    assert set(found) == {f"phi3_mlflow.{name}" for name in reached}


@pytest.mark.slow
def test_what_a_step_really_loads_is_counted_or_named_neutral(tmp_path: Path) -> None:
    """The parsed closure held against what Python loads while the steps work."""
    place = Workspace(tmp_path)
    profile = write_profile(place.folder)
    script = (
        "import atexit, importlib, json, sys\n"
        "name, options = sys.argv[1], sys.argv[2:]\n"
        "module = importlib.import_module(f'phi3_mlflow.stages.{name}')\n"
        "from phi3_mlflow.config.parameters import read_request\n"
        "from phi3_mlflow.pipeline.step import carry_out\n"
        "values = dict(zip(options[::2], options[1::2]))\n"
        "carry_out(module.STEP, read_request(module.STEP.parameters, values))\n"
        "print('LOADED ' + json.dumps([n for n in sys.modules if n.startswith('phi3_mlflow')]))\n"
    )
    for step in ("fetch", "quantize", "export", "log", "register", "evaluate", "promote"):
        done = subprocess.run(
            [sys.executable, "-c", script, step, "profile", str(profile)],
            cwd=place.folder, env=place.whole_environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        line = next(x for x in done.stdout.splitlines() if x.startswith("LOADED "))
        loaded = set(json.loads(line.removeprefix("LOADED ")))
        counted = closure(roots(step)).modules
        # What only neutral modules import (the profile's settings, say) comes with these.
        neutral = closure_of_neutral()
        assert loaded - {*counted} <= neutral, step


def closure_of_neutral() -> set[str]:
    """The neutral modules, and what they import at their top."""
    reached = set(NEUTRAL_MODULES)
    waiting = list(reached)
    while waiting:
        module = code_keys._read(waiting.pop(), SOURCE)
        for name in module.own if module else ():
            parts = name.split(".")
            for own in (".".join(parts[:n]) for n in range(2, len(parts) + 1)):
                if own not in reached:
                    reached.add(own)
                    waiting.append(own)
    return reached


@pytest.mark.slow
def test_a_dry_run_says_which_file_made_a_key_change(tmp_path: Path) -> None:
    place = Workspace(tmp_path / "place")
    place.folder.mkdir()
    profile = write_profile(place.folder)
    code = tmp_path / "code"
    for name in ("phi3_mlflow", "steps", "configs", "data"):
        shutil.copytree(ROOT / name, code / name)
    environment = {**place.whole_environment, "PYTHONPATH": str(code)}

    def step(name: str, *options: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", f"steps.{name}", "--profile", str(profile), *options],
            cwd=place.folder, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    for name in ("fetch", "quantize", "export"):
        step(name)
    file = code / "phi3_mlflow" / "quantization" / "packing.py"
    file.write_text(file.read_text() + "\n# another way to pack\n")
    assert "changed: code.phi3_mlflow/quantization/packing.py" in step("main", "--dry-run", "true")
    step("quantize")  # gives the same bytes
    foretold = step("main", "--dry-run", "true")
    assert "quantize  nothing to do" in foretold
    assert "export    would run: changed: code.phi3_mlflow/quantization/packing.py" in foretold
