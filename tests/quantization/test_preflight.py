from __future__ import annotations

from pathlib import Path

import pytest

from phi3_mlflow.core.errors import EnvironmentProblem
from phi3_mlflow.core.machine import available_memory
from phi3_mlflow.genai.export import export_onnx
from phi3_mlflow.quantization.preflight import needs, preflight
from phi3_mlflow.quantization.quantize import quantize_checkpoint
from phi3_mlflow.quantization.settings import GptqSettings, RtnSettings

RTN = RtnSettings(block_size=16)


def test_enough_is_enough(tiny: Path, tmp_path: Path) -> None:
    needed = preflight(tiny, RTN, tmp_path / "not" / "there", memory_available=2**40)
    assert needed == needs(tiny, RTN)
    assert not (tmp_path / "not").exists()


def test_too_little_of_both_is_one_message(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem) as caught:
        preflight(tiny, RTN, tmp_path, memory_available=2**20, disk_available=2**20)
    message = str(caught.value)
    assert "memory:" in message
    assert "disk at" in message
    assert "0.0 GiB available" in message
    assert "PHI3_MLFLOW_CACHE" in message


def test_disk_is_estimated_from_what_will_be_written(tiny: Path, tmp_path: Path) -> None:
    quantize_checkpoint(tiny, tmp_path / "int4", RTN)
    export_onnx(tmp_path / "int4", tmp_path / "onnx", precision="int4")
    weights = (tmp_path / "int4" / "model.safetensors").stat().st_size
    data = (tmp_path / "onnx" / "model.onnx.data").stat().st_size
    assert weights + data <= needs(tiny, RTN).disk <= weights + data + 32_000_000


def test_calibration_needs_disk_for_the_activations_that_are_too_many_for_memory(
    tiny: Path, tmp_path: Path
) -> None:
    texts = tmp_path / "texts.txt"
    few, many = (
        needs(tiny, GptqSettings(block_size=16, calibration=texts, calibration_tokens=tokens))
        for tokens in (256, 1_048_576)
    )
    assert few.memory + 2**28 < many.memory <= few.memory + 2**29
    assert many.disk > few.disk + 2**30


def test_this_machine_tells_its_memory() -> None:
    memory = available_memory()
    assert memory is None or memory > 0
