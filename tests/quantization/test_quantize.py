from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from phi3_mlflow.checkpoints.reader import CheckpointReader
from phi3_mlflow.core.errors import CheckpointRefused, UserError
from phi3_mlflow.quantization import packing
from phi3_mlflow.quantization.quantize import quantize_checkpoint
from phi3_mlflow.quantization.settings import KQuantMixedSettings, QuantizationSettings, RtnSettings

RTN = RtnSettings(block_size=16)
MIXED = KQuantMixedSettings(block_size=16, int8_block_size=32)


def _dequantized(directory: Path, module: str, bits: int) -> torch.Tensor:
    tensors = load_file(directory / "model.safetensors")
    codes = packing.unpack_gptq_weight(tensors[f"{module}.qweight"], bits)
    zeros = packing.unpack_gptq_zeros(tensors[f"{module}.qzeros"], bits)
    scales = tensors[f"{module}.scales"].T.float()
    return packing.dequantize(codes, scales, zeros, codes.shape[1] // scales.shape[1])


@pytest.mark.parametrize("settings", [RTN, MIXED], ids=lambda s: s.algorithm)
@pytest.mark.parametrize("fixture", ["tiny", "tiny_tied", "tiny_sharded"])
def test_weights_come_back_close(
    fixture: str,
    settings: QuantizationSettings,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    checkpoint = request.getfixturevalue(fixture)
    quantize_checkpoint(checkpoint, tmp_path, settings)
    original = CheckpointReader(checkpoint)
    in_int8 = settings.layers_in_int8(2)
    for layer in range(2):
        for module in (
            "self_attn.qkv_proj",
            "self_attn.o_proj",
            "mlp.gate_up_proj",
            "mlp.down_proj",
        ):
            name = f"model.layers.{layer}.{module}"
            int8 = layer in in_int8 and module.split(".")[1] in settings.projections_in_int8()
            weights = original.read_float(f"{name}.weight")
            error = (_dequantized(tmp_path, name, 8 if int8 else 4) - weights).norm()
            assert error / weights.norm() < (0.01 if int8 else 0.1)
    source = "lm_head.weight" if "lm_head.weight" in original else "model.embed_tokens.weight"
    head = original.read_float(source)
    restored = _dequantized(tmp_path, "lm_head", settings.head_bits())
    assert (restored - head).norm() / head.norm() < 0.1


def test_other_tensors_are_copied_as_they_are(tiny_sharded: Path, tmp_path: Path) -> None:
    quantize_checkpoint(tiny_sharded, tmp_path, RTN)
    written = load_file(tmp_path / "model.safetensors")
    original = CheckpointReader(tiny_sharded)
    for name in ("model.embed_tokens.weight", "model.norm.weight",
                 "model.layers.1.post_attention_layernorm.weight"):  # fmt: skip
        assert torch.equal(written[name], original.read(name))
        assert written[name].dtype == torch.bfloat16


def test_companions_come_along_and_nothing_else(tiny: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(tiny, tmp_path / "with_more")
    (checkpoint / "modeling_phi3.py").write_text("raise SystemExit")
    (checkpoint / "LICENSE.txt").write_text("MIT")
    quantize_checkpoint(checkpoint, tmp_path / "out", RTN)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json", "generation_config.json", "LICENSE.txt"} <= names
    assert "modeling_phi3.py" not in names


def test_same_input_same_bytes(tiny: Path, tmp_path: Path) -> None:
    def digest(out: Path) -> dict[str, str]:
        quantize_checkpoint(tiny, out, MIXED)
        return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(out.iterdir())}

    assert digest(tmp_path / "one") == digest(tmp_path / "two")


def test_config_tells_the_int8_matrices(tiny: Path, tmp_path: Path) -> None:
    quantize_checkpoint(tiny, tmp_path, MIXED)
    quantization = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (quantization["bits"], quantization["group_size"]) == (4, 16)
    assert quantization["desc_act"] is False
    assert quantization["sym"] is False
    overrides = quantization["dynamic"]
    assert overrides["+:lm_head"] == {"bits": 8, "group_size": 32, "sym": True}
    assert any("qkv_proj" in pattern for pattern in overrides)


def test_progress_adds_up_to_the_input(tiny: Path, tmp_path: Path) -> None:
    announced, done = [], []

    class Meter:
        def advance(self, amount: int) -> None:
            done.append(amount)

    @contextmanager
    def progress(description: str, total: int, /) -> Iterator[Meter]:
        announced.append((description, total))
        yield Meter()

    report = quantize_checkpoint(tiny, tmp_path, RTN, progress)
    assert announced == [("quantizing (rtn)", report.bytes_in)]
    assert sum(done) == report.bytes_in


def test_a_block_size_that_does_not_divide_is_refused(tiny: Path, tmp_path: Path) -> None:
    settings = RtnSettings(block_size=64)
    with pytest.raises(UserError, match="block_size 64 does not divide the 96 columns"):
        quantize_checkpoint(tiny, tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()


def test_layers_that_are_not_there_are_refused(tiny: Path, tmp_path: Path) -> None:
    settings = KQuantMixedSettings(block_size=16, mixed_layers=(0, 7))
    with pytest.raises(UserError, match=r"names \[7\]; the model has the layers 0 to 1"):
        quantize_checkpoint(tiny, tmp_path, settings)


def test_a_shared_embedding_needs_a_tied_model(tiny: Path, tmp_path: Path) -> None:
    settings = RtnSettings(block_size=16, embedding="shared")
    with pytest.raises(UserError, match="tied"):
        quantize_checkpoint(tiny, tmp_path, settings)


def test_a_quantized_checkpoint_is_not_quantized_again(tiny: Path, tmp_path: Path) -> None:
    quantize_checkpoint(tiny, tmp_path / "once", RTN)
    with pytest.raises(CheckpointRefused, match="quantized already"):
        quantize_checkpoint(tmp_path / "once", tmp_path / "twice", RTN)


def test_another_architecture_is_refused(tiny: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(tiny, tmp_path / "llama")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(
        json.dumps({**config, "architectures": ["LlamaForCausalLM"]})
    )
    with pytest.raises(CheckpointRefused, match="LlamaForCausalLM"):
        quantize_checkpoint(checkpoint, tmp_path / "out", RTN)


def test_weights_that_are_no_numbers_are_refused(tiny: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(tiny, tmp_path / "nan")
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = float("nan")
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(CheckpointRefused, match=r"layers\.1\.mlp\.down_proj.*NaN"):
        quantize_checkpoint(checkpoint, tmp_path / "out", RTN)
