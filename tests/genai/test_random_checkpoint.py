from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.random_checkpoint import MODELS, tensor_shapes, write_random_checkpoint
from phi3_mlflow.checkpoints.reader import CheckpointReader
from phi3_mlflow.genai.check import check_export
from phi3_mlflow.genai.export import export_onnx
from phi3_mlflow.quantization.quantize import quantize_checkpoint
from phi3_mlflow.quantization.settings import RtnSettings

_SMALL = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "eos_token_id": 500,
    "pad_token_id": 500,
}


@pytest.mark.parametrize(
    ("model", "billions"),
    [("phi-3-mini-4k", 3.82), ("phi-3-medium-4k", 13.96), ("phi-4-mini", 3.84)],
)
def test_the_shapes_are_those_of_the_published_sizes(model: str, billions: float) -> None:
    config = {"tie_word_embeddings": False, **MODELS[model]}
    weights = 0
    for shape in tensor_shapes(config).values():
        weights += shape[0] * (shape[1] if len(shape) == 2 else 1)
    assert round(weights / 1e9, 2) == billions


def test_what_is_written_can_be_quantized_and_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODELS, "small", {**MODELS["phi-3-mini-4k"], **_SMALL})
    size = write_random_checkpoint("small", tmp_path / "float")
    reader = CheckpointReader(tmp_path / "float")
    assert sum(reader.entry(name).nbytes for name in reader) == size
    settings = RtnSettings()
    quantize_checkpoint(tmp_path / "float", tmp_path / "int4", settings)
    export_onnx(tmp_path / "int4", tmp_path / "onnx", precision="int4")
    assert check_export(tmp_path / "onnx", settings).logits == 512
