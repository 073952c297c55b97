from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from phi3_mlflow.core.errors import UserError
from phi3_mlflow.quantization.calibration import calibration_sequences
from phi3_mlflow.quantization.gptq import gptq
from phi3_mlflow.quantization.moments import correct_drift, second_moments
from phi3_mlflow.quantization.packing import dequantize
from phi3_mlflow.quantization.quantize import quantize_checkpoint
from phi3_mlflow.quantization.rounding import Rounded, k_quant
from phi3_mlflow.quantization.settings import (
    QuantizationSettings,
    RtnSettings,
    quantization_settings,
)
from phi3_mlflow.rows.texts import read_texts
from tests.fixtures.tiny_phi3 import make_tiny


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Enough text for a tiny model."""
    file = tmp_path / "texts.jsonl"
    rows: list[dict[str, object]] = [{"text": _sentence(i)} for i in range(40)]
    rows.append({"messages": [{"role": "user", "content": "Hello"}]})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def _sentence(i: int) -> str:
    return f"Text number {i} says that {i} and {i + 1} make {2 * i + 1}."


def _settings(texts: Path, **more: object) -> QuantizationSettings:
    return quantization_settings(
        {
            "algorithm": "gptq",
            "block_size": 16,
            "calibration": texts,
            "calibration_tokens": 1024,
            "calibration_length": 64,
            **more,
        }
    )


def _inputs(count: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn((columns, columns), generator=generator)
    return torch.randn((count, columns), generator=generator) @ mixing


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_output_is_closer_than_with_independent_rounding(symmetric: bool) -> None:
    inputs = _inputs(2000, 64)
    weights = torch.randn((48, 64), generator=torch.Generator().manual_seed(1))

    def output_error(rounded: Rounded) -> float:
        return float(((dequantize(*rounded, 16) - weights) @ inputs.T).square().mean())

    compensated = gptq(weights.clone(), second_moments(inputs), 4, 16, symmetric, 0.01)
    assert compensated.codes.dtype == torch.uint8
    assert output_error(compensated) < 0.75 * output_error(k_quant(weights, 4, 16, symmetric))


def test_drift_is_made_good() -> None:
    ideal = _inputs(2000, 32)
    inputs = 0.9 * ideal + 0.05 * _inputs(2000, 32).roll(1, 1)
    weights = torch.randn((16, 32), generator=torch.Generator().manual_seed(1))
    moments = second_moments(inputs)

    def error(adapted: torch.Tensor) -> float:
        return float((inputs @ adapted.T - ideal @ weights.T).square().mean())

    whole, half = (correct_drift(weights, inputs, ideal, moments, 1e-4, s) for s in (1.0, 0.5))
    assert error(whole) < 0.01 * error(weights)
    assert error(whole) < error(half) < error(weights)
    assert torch.equal(correct_drift(weights, ideal, ideal, moments, 1e-4, 1.0), weights)


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    weights = torch.randn((16, 32), generator=torch.Generator().manual_seed(2))
    rounded = gptq(weights.clone(), torch.zeros((32, 32)), 4, 16, True, 0.01)
    assert float((dequantize(*rounded, 16) - weights).abs().max()) < 0.4


def test_second_moments_are_the_mean_outer_product() -> None:
    inputs = _inputs(100, 8).reshape(4, 25, 8)
    expected = torch.einsum("abi,abj->ij", inputs, inputs) / 100
    torch.testing.assert_close(second_moments(inputs), expected)


@pytest.mark.parametrize(
    ("fixture", "drift"), [("tiny", 0.0), ("tiny_tied", 0.0), ("tiny_sharded", 0.0), ("tiny", 0.5)]
)
def test_calibration_brings_the_model_closer(
    fixture: str, drift: float, texts: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    checkpoint = request.getfixturevalue(fixture)
    settings = _settings(texts, drift_correction=drift)
    quantize_checkpoint(checkpoint, tmp_path / "gptq", settings)
    quantize_checkpoint(checkpoint, tmp_path / "rtn", RtnSettings(block_size=16))
    names = {"model.safetensors", "config.json", "tokenizer.json"}
    assert names <= {file.name for file in (tmp_path / "gptq").iterdir()}
    errors = {name: _output_error(checkpoint, tmp_path / name) for name in ("gptq", "rtn")}
    assert errors["gptq"] < errors["rtn"]


def _output_error(checkpoint: Path, quantized: Path) -> float:
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, Phi3ForCausalLM

    from phi3_mlflow.quantization import packing

    def load() -> torch.nn.Module:
        return Phi3ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()

    reference, model = load(), load()
    tensors = load_file(quantized / "model.safetensors")
    for name in [n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")]:
        codes = packing.unpack_gptq_weight(tensors[f"{name}.qweight"], 4)
        zeros = packing.unpack_gptq_zeros(tensors[f"{name}.qzeros"], 4)
        weights = packing.dequantize(codes, tensors[f"{name}.scales"].T, zeros, 16)
        model.get_submodule(name).weight.data.copy_(weights)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokens = torch.tensor([tokenizer(_sentence(i))["input_ids"][:40] for i in range(50, 70)])
    with torch.inference_mode():
        return float((model(tokens).logits - reference(tokens).logits).square().mean())


def test_same_texts_same_bytes(tiny: Path, texts: Path, tmp_path: Path) -> None:
    digests = []
    for name in ("one", "two"):
        quantize_checkpoint(tiny, tmp_path / name, _settings(texts))
        file = tmp_path / name / "model.safetensors"
        digests.append(hashlib.sha256(file.read_bytes()).hexdigest())
    assert digests[0] == digests[1]


def test_mixed_precision_goes_with_calibration(tiny: Path, texts: Path, tmp_path: Path) -> None:
    settings = _settings(texts, int8_projections=("down_proj",), mixed_layers="all")
    report = quantize_checkpoint(tiny, tmp_path / "out", settings)
    assert report.int8_weights == 2 * 64 * 96 + 320 * 64


def test_sequences_are_whole_and_as_many_as_asked(tiny: Path, texts: Path) -> None:
    sequences = calibration_sequences(tiny, _settings(texts))
    assert sequences.shape == (16, 64)
    assert sequences.dtype == torch.int64


def test_too_little_text_is_refused(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("Too short.")
    with pytest.raises(UserError, match="fewer than one sequence"):
        calibration_sequences(tiny, _settings(file))


def test_conversations_are_written_out_by_the_chat_template(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    messages = [{"role": "user", "content": "x" * 400}]
    file.write_text(json.dumps({"messages": messages}) + "\n")
    settings = _settings(file, calibration_tokens=256)
    first = calibration_sequences(tiny, settings)[0]
    assert first[0] == 3  # <|user|>
    assert len(set(first[1:].tolist())) == 1


@pytest.mark.parametrize("line", ['{"txt": "a"}', "[1]", '{"text": 3}', "{"])
def test_a_line_without_a_text_is_named(line: str, tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(UserError, match="line 2"):
        read_texts(file, "calibration")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.jsonl cannot be read"):
        read_texts(tmp_path / "none.jsonl", "calibration")


def test_the_bytes_do_not_depend_on_the_machines_number_of_cores(
    texts: Path, tmp_path: Path
) -> None:
    # Large enough that a matrix product is shared out over threads.
    model = make_tiny(tmp_path / "model", hidden_size=256, intermediate_size=512)
    before, found = torch.get_num_threads(), {}
    try:
        for cores in (1, 2, 3):
            torch.set_num_threads(cores)
            quantize_checkpoint(model, tmp_path / str(cores), _settings(texts))
            assert torch.get_num_threads() == cores, "left as it was"
            found[cores] = _digest(tmp_path / str(cores))
    finally:
        torch.set_num_threads(before)
    assert len(set(found.values())) == 1, found


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
