"""The artifact store under a champion is damaged: what each command does about it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest

from phi3_mlflow.config.parameters import read_request
from phi3_mlflow.core.errors import EnvironmentProblem
from phi3_mlflow.pipeline.step import Outcome, carry_out
from phi3_mlflow.server import holder
from phi3_mlflow.stages import (
    cache,
    evaluate,
    export,
    fetch,
    log,
    promote,
    quantize,
    register,
    score,
)
from phi3_mlflow.stages.main import COMMAND
from phi3_mlflow.tracking import registry
from phi3_mlflow.tracking.registry import VersionName
from tests.conftest import Workspace, own_store
from tests.fixtures.tiny_line import write_profile

pytestmark = pytest.mark.slow

DATA = "artifacts/onnx/model.onnx.data"


class Line:
    """The steps, in this process, on one profile."""

    def __init__(self, place: Workspace) -> None:
        self.place = place
        self.profile = str(write_profile(place.folder))

    def request(self, command: Any, **values: str) -> Any:
        known = {"profile": self.profile, **values}
        return read_request(command.parameters, known)

    def do(self, module: Any, **values: str) -> Outcome[Any]:
        return carry_out(module.STEP, self.request(module.STEP, **values))

    def from_log(self) -> list[str]:
        """The steps whose output lives in MLflow; gives the names of those that had work."""
        done = [self.do(module) for module in (log, register, evaluate, promote)]
        return [outcome.step.name for outcome in done if not outcome.hit]


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Line]:
    with own_store(tmp_path_factory.mktemp("damaged")) as place:
        made = Line(place)
        for module in (fetch, quantize, export):
            made.do(module)
        assert made.from_log() == ["log", "register", "evaluate", "promote"]
        yield made


def champion() -> str:
    return str(registry.alias_of("tiny", registry.CHAMPION))


def files_of(version: str) -> Path:
    return Path(mlflow.artifacts.download_artifacts(f"models:/tiny/{version}"))


def flip(folder: Path) -> None:
    """Other bytes, 4 kB of them; size and modification time stay."""
    file = folder / DATA
    before = file.stat()
    with file.open("r+b") as stream:
        old = stream.read(4096)
        stream.seek(0)
        stream.write(bytes(byte ^ 255 for byte in old))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def remove(folder: Path) -> None:
    (folder / DATA).unlink()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (remove, f"{DATA} is missing"),
        (flip, f"{DATA} has other bytes than were logged"),
        (shutil.rmtree, "are gone"),
    ],
)
def test_what_is_damaged_is_logged_anew_and_takes_the_champions_place(
    damage: Callable[[Path], None], told: str, line: Line, capsys: pytest.CaptureFixture[str]
) -> None:
    assert line.from_log() == ["promote"], "which always looks for itself"
    before = champion()
    damage(files_of(before))
    COMMAND.run(line.request(COMMAND, dry_run="true"))
    assert "log       would run: what it left is no longer whole" in capsys.readouterr().out
    assert line.from_log() == ["log", "register", "evaluate", "promote"]
    assert told in capsys.readouterr().err
    assert champion() == str(int(before) + 1)
    tags = registry.describe(VersionName("tiny", champion())).tags
    assert told in tags["promotion_reason"]
    assert (tags["gate"], tags["gate_against"]) == ("passed", before)
    assert holder.load(holder.resolve("models:/tiny@champion")).version == champion()
    assert line.from_log() == ["promote"]


@pytest.mark.parametrize("damage", [flip, remove])
def test_a_damaged_version_is_refused_by_name(
    damage: Callable[[Path], None], line: Line, capsys: pytest.CaptureFixture[str]
) -> None:
    number = champion()
    file = files_of(number) / DATA
    kept = file.read_bytes()
    rows = line.place.folder / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "Hi"}) + "\n")
    damage(files_of(number))

    def served() -> None:
        holder.load(holder.resolve("models:/tiny@champion"))

    def scored() -> None:
        output = str(line.place.folder / "answers.jsonl")
        score.COMMAND.run(line.request(score.COMMAND, input=str(rows), output=output))

    for refused in (
        served,
        scored,
        lambda: line.do(evaluate),
        lambda: line.do(promote),
        lambda: line.do(register),
    ):
        with pytest.raises(EnvironmentProblem) as told:
            refused()
        for words in (DATA, "models:/", "mlflow run ."):
            assert words in str(told.value)
    look = read_request(cache.COMMAND.parameters, {"do": "verify"})
    cache.COMMAND.run(look)
    assert f"is damaged: {DATA}" in capsys.readouterr().err
    file.write_bytes(kept)
    cache.COMMAND.run(look)
    assert "damaged" not in capsys.readouterr().err
    served()
