"""A calibrated quantization that is killed goes on where it was, to the same bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from phi3_mlflow.core.progress import Meter
from phi3_mlflow.layers import states
from phi3_mlflow.quantization import calibrated, unfinished
from phi3_mlflow.quantization.quantize import quantize_checkpoint
from phi3_mlflow.quantization.settings import QuantizationSettings, quantization_settings
from tests.fixtures.tiny_phi3 import make_tiny


class Killed(BaseException):
    """What a test ends a run with."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five layers with a window that is shorter than the calibration texts."""
    return make_tiny(tmp_path_factory.mktemp("model"), num_hidden_layers=5, sliding_window=40)


@pytest.fixture(autouse=True)
def saves_after_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unfinished, "SAVE_EVERY_S", 0.0)


def settings(folder: Path, **more: object) -> QuantizationSettings:
    texts = folder / "texts.txt"
    texts.write_text("".join(f"{i} and {i + 1} make {2 * i + 1}. " for i in range(60)))
    return quantization_settings(
        {
            "algorithm": "gptq",
            "block_size": 16,
            "calibration": texts,
            "calibration_tokens": 512,
            "calibration_length": 64,
            "threads": 1,
            **more,
        }
    )


def digests(folder: Path) -> dict[str, str]:
    files = sorted(folder.iterdir())
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


class Lines:
    """What a run says of its progress."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.done = self.total = 0

    @contextmanager
    def __call__(
        self, description: str, total: int | None, unit: str = "bytes", /
    ) -> Iterator[Meter]:
        self.said.append(description)
        self.total = total or 0
        yield self

    def advance(self, amount: int) -> None:
        self.done += amount


def killed_after(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next run is killed while it does the layer after so many."""
    round_matrix, calls = calibrated._round, iter(range(1000))

    def until(*given: object) -> object:
        if next(calls) == layers * 4 + 2:
            raise Killed
        return round_matrix(*given)

    monkeypatch.setattr(calibrated, "_round", until)


@pytest.mark.parametrize(("drift", "most"), [(0.0, 2**29), (0.5, 0)])
def test_the_bytes_are_those_of_an_undisturbed_run(
    drift: float, most: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings(tmp_path, drift_correction=drift)
    quantize_checkpoint(model, tmp_path / "whole", chosen)
    monkeypatch.setattr(states.States.__init__, "__kwdefaults__", {"folder": None, "most": most})
    folder, said = tmp_path / "unfinished", Lines()
    for layers in (1, 0, 2):  # of those that the run before has left
        with monkeypatch.context() as patch:
            killed_after(layers, patch)
            with pytest.raises(Killed):
                quantize_checkpoint(model, tmp_path / "out", chosen, said, unfinished=folder)
    quantize_checkpoint(model, tmp_path / "out", chosen, said, unfinished=folder)
    assert said.said == [
        "quantizing (gptq)",
        "quantizing (gptq), from layer 1 on",
        "quantizing (gptq), from layer 1 on",
        "quantizing (gptq), from layer 3 on",
    ]
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_several_files_are_gone_on_with(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings(tmp_path)
    monkeypatch.setattr(calibrated.CheckpointWriter.__init__, "__defaults__", (70_000, 0))
    quantize_checkpoint(model, tmp_path / "whole", chosen)
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) > 2
    for layers in (1, 2, 1):
        with monkeypatch.context() as patch:
            killed_after(layers, patch)
            with pytest.raises(Killed):
                quantize_checkpoint(model, tmp_path / "out", chosen, unfinished=tmp_path / "u")
    quantize_checkpoint(model, tmp_path / "out", chosen, unfinished=tmp_path / "u")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@pytest.mark.parametrize("moment", ["fsync", "sync", "replace"])
def test_a_kill_while_saving_costs_one_layer(
    moment: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, folder = settings(tmp_path), tmp_path / "unfinished"
    quantize_checkpoint(model, tmp_path / "whole", chosen)
    with monkeypatch.context() as patch:
        killed_after(2, patch)
        with pytest.raises(Killed):
            quantize_checkpoint(model, tmp_path / "out", chosen, unfinished=folder)

    def die(*given: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        if moment == "fsync":
            patch.setattr(unfinished.os, "fsync", die)
        elif moment == "sync":
            patch.setattr(calibrated.CheckpointWriter, "sync", die)
        else:
            patch.setattr(Path, "replace", die)
        with pytest.raises(Killed):
            quantize_checkpoint(model, tmp_path / "out", chosen, unfinished=folder)
    assert json.loads((folder / "progress.json").read_text())["groups"] == 3
    said = Lines()
    quantize_checkpoint(model, tmp_path / "out", chosen, said, unfinished=folder)
    assert said.said == ["quantizing (gptq), from layer 2 on"]
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "progress.json").write_text("{"),
        lambda folder: (folder / "progress.json").unlink(),
        lambda folder: next(folder.glob("states-*.f32")).write_bytes(b"short"),
        lambda folder: next(folder.glob("states-*.f32")).unlink(),
    ],
)
def test_what_is_damaged_is_done_anew(
    damage: object, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, folder = settings(tmp_path), tmp_path / "unfinished"
    with monkeypatch.context() as patch:
        killed_after(2, patch)
        with pytest.raises(Killed):
            quantize_checkpoint(model, tmp_path / "out", chosen, unfinished=folder)
    damage(folder)  # type: ignore[operator]
    said = Lines()
    quantize_checkpoint(model, tmp_path / "out", chosen, said, unfinished=folder)
    assert said.said == ["quantizing (gptq)"]
    quantize_checkpoint(model, tmp_path / "whole", chosen)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_the_work_adds_up(model: Path, tmp_path: Path) -> None:
    said = Lines()
    quantize_checkpoint(model, tmp_path / "out", settings(tmp_path, calibration_tokens=1024), said)
    assert said.done == pytest.approx(said.total, rel=0.05)
