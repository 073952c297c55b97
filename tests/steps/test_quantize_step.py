"""`quantize` with calibration, killed between two layers."""

from __future__ import annotations

from pathlib import Path

import pytest

from phi3_mlflow.artifacts.cache import StepCache
from phi3_mlflow.config.parameters import read_request
from phi3_mlflow.core import console
from phi3_mlflow.pipeline.step import carry_out
from phi3_mlflow.quantization import calibrated, unfinished
from phi3_mlflow.stages import fetch, quantize
from tests.conftest import Workspace
from tests.fixtures.tiny_line import write_profile


class Killed(BaseException):
    """What the test ends a run with."""


def test_a_killed_step_goes_on_and_leaves_nothing_behind(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = workspace.folder / "texts.txt"
    texts.write_text("".join(f"{i} and {i + 1} make {2 * i + 1}. " for i in range(60)))
    quantization = {
        "algorithm": "gptq",
        "calibration": str(texts),
        "calibration_tokens": 512,
        "calibration_length": 64,
        "threads": 1,
    }
    profile = {"profile": str(write_profile(workspace.folder, quantization=quantization))}
    carry_out(fetch.STEP, read_request(fetch.STEP.parameters, profile))
    request = read_request(quantize.STEP.parameters, profile)
    console.set_quiet(False)
    monkeypatch.setattr(unfinished, "SAVE_EVERY_S", 0.0)
    round_matrix, calls = calibrated._round, iter(range(99))

    def until(*given: object) -> object:
        if next(calls) == 5:
            raise Killed
        return round_matrix(*given)

    with monkeypatch.context() as patch:
        patch.setattr(calibrated, "_round", until)
        with pytest.raises(Killed):
            carry_out(quantize.STEP, request)
    (folder,) = workspace.cache.glob("downloads/quantize-*[0-9a-f]")
    assert (folder / "progress.json").is_file()
    done = carry_out(quantize.STEP, request)
    assert not done.hit
    assert "quantizing (gptq), from layer 1 on" in capsys.readouterr().err
    assert not list(workspace.cache.glob("downloads/quantize-*")), "nor its lock"
    once_more = read_request(quantize.STEP.parameters, {**profile, "force": "true"})
    again = carry_out(quantize.STEP, once_more)
    assert again.entry.manifest.digest == done.entry.manifest.digest
    assert StepCache().find("quantize", done.entry.key)


def test_rounding_keeps_nothing_unfinished(workspace: Workspace) -> None:
    profile = {"profile": str(write_profile(workspace.folder))}
    carry_out(fetch.STEP, read_request(fetch.STEP.parameters, profile))
    carry_out(quantize.STEP, read_request(quantize.STEP.parameters, profile))
    assert not list(Path(workspace.cache).glob("downloads/quantize-*"))
