"""A logged model needs what its own requirements.txt names, and nothing else of this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import mlflow
import pytest
from packaging.requirements import Requirement

SCRIPT = """
import json, sys
import mlflow
model = mlflow.pyfunc.load_model(sys.argv[1])
answer = model.predict(json.loads(sys.argv[2]))
mine = [name for name in sys.modules if name.partition(".")[0] in ("phi3_mlflow", "steps")]
print(json.dumps([answer, mine, sys.path]))
"""
QUESTION = {
    "messages": [{"role": "user", "content": "What is the capital of Spain?"}],
    "max_tokens": 4,
}


def closure(requirements: Iterable[str]) -> dict[str, Distribution]:
    """The installed distributions that pip would install for these requirements."""
    found: dict[str, Distribution] = {}
    waiting = [Requirement(line) for line in requirements]
    seen = set()
    while waiting:
        wanted = waiting.pop()
        key = (wanted.name.lower().replace("_", "-"), frozenset(wanted.extras))
        if key in seen:
            continue
        seen.add(key)
        try:
            installed = distribution(wanted.name)
        except PackageNotFoundError:  # another package's extra, not installed here either
            continue
        found[key[0]] = installed
        for line in installed.requires or ():
            inner = Requirement(line)
            extras = {"", *wanted.extras}
            if inner.marker is None or any(inner.marker.evaluate({"extra": e}) for e in extras):
                waiting.append(inner)
    return found


def link(distributions: Iterable[Distribution], site: Path) -> None:
    """Make a site-packages folder that holds these distributions alone."""
    for installed in distributions:
        for file in installed.files or ():
            source = Path(str(installed.locate_file(file)))
            if ".." in file.parts or not source.is_file():
                continue
            target = site / file
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                target.symlink_to(source)


@pytest.mark.slow
@pytest.mark.parametrize("flavor", ["onnx", "transformers"])
def test_a_logged_model_answers_with_its_own_requirements_alone(
    request: pytest.FixtureRequest, flavor: str, tmp_path: Path
) -> None:
    info = request.getfixturevalue(f"{flavor}_info")
    folder = Path(mlflow.artifacts.download_artifacts(info.model_uri))
    lines = (folder / "requirements.txt").read_text().split()
    needed = closure(lines)
    for line in lines:
        wanted = Requirement(line)
        assert wanted.specifier.contains(needed[wanted.name.lower()].version), line
    # It has to be a part of this environment, or the test shows nothing.
    assert "pytest" not in needed
    assert ("torch" in needed) == (flavor == "transformers")
    assert "torchvision" not in needed
    site = tmp_path / "site"
    link(needed.values(), site)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MLFLOW"))}
    done = subprocess.run(
        [sys.executable, "-S", "-s", "-c", SCRIPT, str(folder), json.dumps(QUESTION)],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    answer, mine, path = json.loads(done.stdout.splitlines()[-1])
    here = request.getfixturevalue(f"{flavor}_model").predict(QUESTION)
    assert answer["choices"] == here["choices"]
    assert mine == []
    assert str(Path(__file__).parents[2]) not in path
    assert not [entry for entry in path if entry.endswith(("site-packages", "dist-packages"))]
