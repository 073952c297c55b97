from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from phi3_mlflow.core.errors import EnvironmentProblem
from phi3_mlflow.quantization.quantize import quantize_checkpoint
from phi3_mlflow.quantization.settings import GptqSettings, QuantizationSettings
from tests.fixtures.tiny_phi3 import make_tiny


def _settings(directory: Path) -> QuantizationSettings:
    file = directory / "texts.jsonl"
    line = {"text": "The quick brown fox jumps over the lazy dog, again and again. " * 4}
    file.write_text((json.dumps(line) + "\n") * 8)
    return GptqSettings(
        backend="optimum",
        calibration=file,
        calibration_tokens=512,
        calibration_length=64,
    )


def test_without_gptqmodel_the_message_says_how_to_get_it(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gptqmodel", None)
    with pytest.raises(EnvironmentProblem, match="pip install"):
        quantize_checkpoint(tiny, tmp_path / "out", _settings(tmp_path))


@pytest.mark.slow
def test_what_optimum_quantized_is_read_right(tmp_path: Path) -> None:
    pytest.importorskip("gptqmodel")
    pytest.importorskip("optimum.gptq")
    from phi3_mlflow.genai.check import check_export
    from phi3_mlflow.genai.export import export_onnx

    checkpoint = make_tiny(tmp_path / "float", hidden_size=128, intermediate_size=256)
    settings = _settings(tmp_path)
    quantize_checkpoint(checkpoint, tmp_path / "int4", settings)
    # A fresh directory: nothing of optimum's own files may be left in it.
    assert len(list((tmp_path / "int4").glob("*.safetensors"))) == 1
    assert not [entry for entry in (tmp_path / "int4").iterdir() if entry.is_dir()]
    export_onnx(tmp_path / "int4", tmp_path / "onnx", precision="int4")
    assert check_export(tmp_path / "onnx", settings).int4_nodes == 11
