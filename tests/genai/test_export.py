from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from phi3_mlflow.core.errors import CheckpointRefused, ProjectError, UserError
from phi3_mlflow.evaluation.logits import OnnxLogits
from phi3_mlflow.genai.check import check_export
from phi3_mlflow.genai.export import export_onnx
from phi3_mlflow.genai.kept import kv_cache
from phi3_mlflow.quantization import packing
from phi3_mlflow.quantization.quantize import quantize_checkpoint
from phi3_mlflow.quantization.settings import KQuantMixedSettings, QuantizationSettings, RtnSettings
from phi3_mlflow.runtime.genai_config import GenaiConfig
from tests.fixtures.tiny_phi3 import make_tiny

RTN = RtnSettings(block_size=16)
MIXED = KQuantMixedSettings(block_size=16, int8_block_size=32)


def _tokens(count: int) -> list[int]:
    return [1] + [int(t) for t in np.random.default_rng(0).integers(6, 260, count - 1)]


def _torch_logits(model: torch.nn.Module, tokens: list[int]) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].float().numpy()


def _onnx_logits(directory: Path, tokens: list[int]) -> np.ndarray:
    import onnxruntime_genai as og

    model = og.Model(str(directory))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(tokens) + 1)
    generator = og.Generator(model, params)
    generator.append_tokens(np.array([tokens], dtype=np.int32))
    return np.array(generator.get_output("logits"))[0]


def _load(checkpoint: Path) -> torch.nn.Module:
    from transformers import Phi3ForCausalLM

    return Phi3ForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def _dequantized_model(checkpoint: Path, quantized: Path) -> torch.nn.Module:
    """The float model with every matrix replaced by what its codes stand for."""
    from safetensors.torch import load_file

    from phi3_mlflow.quantization.stored import StoredQuantization

    model = _load(checkpoint)
    config = json.loads((quantized / "config.json").read_text())
    tensors = load_file(quantized / "model.safetensors")
    stored = StoredQuantization.read(config, quantized)
    assert stored is not None
    head = None
    for name in [n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")]:
        bits, block_size = stored.layout_of(name)
        codes = packing.unpack_gptq_weight(tensors[f"{name}.qweight"], bits)
        zeros = packing.unpack_gptq_zeros(tensors[f"{name}.qzeros"], bits)
        weights = packing.dequantize(codes, tensors[f"{name}.scales"].T, zeros, block_size)
        model.get_submodule(name).weight.data.copy_(weights)
        head = name
    assert head == "lm_head" or "lm_head.qweight" in tensors
    return model


@pytest.mark.parametrize("pieces", [(48,), (20, 28), (17, 1, 15, 15)])
def test_logits_equal_torch_beyond_the_attention_window(
    tmp_path: Path, pieces: tuple[int, ...]
) -> None:
    import onnxruntime_genai as og

    checkpoint = make_tiny(tmp_path / "checkpoint", sliding_window=16)
    (tmp_path / "onnx").mkdir()
    export_onnx(checkpoint, tmp_path / "onnx", precision="fp32")
    tokens = _tokens(48)
    wanted = _torch_logits(_load(checkpoint), tokens)
    model = og.Model(str(tmp_path / "onnx"))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(tokens) + 1)
    generator = og.Generator(model, params)
    start = 0
    for count in pieces:
        end = start + count
        generator.append_tokens(np.array([tokens[start:end]], dtype=np.int32))
        found = np.array(generator.get_output("logits"))[0]
        # What a generator shows of a piece differs by length: all of it, or its last place.
        assert np.abs(found - wanted[start:end][-len(found) :]).max() < 1e-4
        start = end


def test_float_logits_equal_torch(any_tiny: Path, tmp_path: Path) -> None:
    export_onnx(any_tiny, tmp_path, precision="fp32")
    model = _load(any_tiny)
    # 20 tokens stay within the short rotary factors of the 128k models, 48 need the long ones.
    for count in (20, 48):
        tokens = _tokens(count)
        difference = np.abs(_onnx_logits(tmp_path, tokens) - _torch_logits(model, tokens)).max()
        assert difference < 1e-4, f"{count} tokens"
    check_export(tmp_path, None)


@pytest.mark.parametrize("settings", [RTN, MIXED], ids=lambda s: s.algorithm)
def test_int4_logits_equal_the_dequantized_model(
    any_tiny: Path, settings: QuantizationSettings, tmp_path: Path
) -> None:
    quantize_checkpoint(any_tiny, tmp_path / "int4", settings)
    # Accuracy level 1 computes in float32, so what is compared is the weights alone.
    export_onnx(tmp_path / "int4", tmp_path / "onnx", precision="int4", accuracy_level=1)
    tokens = _tokens(20)
    expected = _torch_logits(_dequantized_model(any_tiny, tmp_path / "int4"), tokens)
    assert np.abs(_onnx_logits(tmp_path / "onnx", tokens) - expected).max() < 1e-3
    report = check_export(tmp_path / "onnx", settings.model_copy(update={"accuracy_level": 1}))
    assert report.int4_nodes + report.int8_nodes == 11
    assert report.float_matmuls == 0


@pytest.mark.parametrize("embedding", ["int4", "int8"])
def test_an_embedding_can_be_quantized_by_itself(
    tiny: Path, embedding: str, tmp_path: Path
) -> None:
    settings = RtnSettings(block_size=16, embedding=embedding)
    quantize_checkpoint(tiny, tmp_path / "int4", settings)
    export_onnx(tmp_path / "int4", tmp_path / "onnx", precision="int4", accuracy_level=1)
    plain = settings.model_copy(update={"embedding": "fp32"})
    quantize_checkpoint(tiny, tmp_path / "plain4", plain)
    export_onnx(tmp_path / "plain4", tmp_path / "plain", precision="int4", accuracy_level=1)
    report = check_export(tmp_path / "onnx", settings.model_copy(update={"accuracy_level": 1}))
    assert report.embedding == embedding
    assert report.data_bytes < (tmp_path / "plain" / "model.onnx.data").stat().st_size
    tokens = _tokens(20)
    new, old = (_onnx_logits(tmp_path / name, tokens) for name in ("onnx", "plain"))
    correlation = np.corrcoef(new.ravel(), old.ravel())[0, 1]
    assert correlation > {"int4": 0.97, "int8": 0.9995}[embedding]


def test_same_checkpoint_same_bytes(tiny: Path, tmp_path: Path) -> None:
    quantize_checkpoint(tiny, tmp_path / "int4", MIXED)

    def digests(out: Path, precision: str, source: Path) -> dict[str, str]:
        export_onnx(source, out, precision=precision)
        return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(out.iterdir())}

    moved = shutil.copytree(tmp_path / "int4", tmp_path / "elsewhere")
    first = digests(tmp_path / "a", "int4", tmp_path / "int4")
    assert first == digests(tmp_path / "b", "int4", moved)
    assert {"model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json"} <= set(first)
    assert digests(tmp_path / "c", "fp32", tiny) == digests(tmp_path / "d", "fp32", tiny)


def test_a_tied_head_is_stored_once(tiny_tied: Path, tmp_path: Path) -> None:
    quantize_checkpoint(tiny_tied, tmp_path / "int4", RTN)
    export_onnx(tmp_path / "int4", tmp_path / "onnx", precision="int4")
    report = check_export(tmp_path / "onnx", RTN)
    assert report.embedding == "int4 (shared)"
    parameters = sum(p.numel() for p in _load(tiny_tied).parameters())
    rotary = 2 * (256 + 32) * 24 * 4
    assert report.data_bytes < parameters * 0.8 + rotary


@pytest.mark.parametrize("embedding", ["fp32", "int8"])
def test_a_tied_model_can_have_an_embedding_of_its_own(
    tiny_tied: Path, embedding: str, tmp_path: Path
) -> None:
    settings = RtnSettings(block_size=16, embedding=embedding)
    quantize_checkpoint(tiny_tied, tmp_path / "int4", settings)
    export_onnx(tmp_path / "int4", tmp_path / "onnx", precision="int4")
    report = check_export(tmp_path / "onnx", settings)
    assert report.embedding == {"fp32": "float", "int8": "int8"}[embedding]
    with pytest.raises(ProjectError, match=r"not int4 \(shared\)"):
        check_export(tmp_path / "onnx", settings.model_copy(update={"embedding": "shared"}))


def test_the_stock_builder_reads_the_quantized_checkpoint(tiny: Path, tmp_path: Path) -> None:
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    quantize_checkpoint(tiny, tmp_path / "int4", MIXED)
    export_onnx(tmp_path / "int4", tmp_path / "ours", precision="int4")
    source, out = str(tmp_path / "int4"), str(tmp_path / "stock")
    options = parse_extra_options(
        "", source, out, "int4", "cpu", str(tmp_path), ["accuracy_level=4"]
    )
    create_model("", source, out, "int4", "cpu", str(tmp_path), **options)
    tokens = _tokens(20)
    ours, stock = (_onnx_logits(tmp_path / name, tokens) for name in ("ours", "stock"))
    assert np.abs(ours - stock).max() < 1e-3


def test_a_differing_build_is_named(tiny: Path, tmp_path: Path) -> None:
    quantize_checkpoint(tiny, tmp_path / "int4", RTN)
    export_onnx(tmp_path / "int4", tmp_path / "onnx", precision="int4", accuracy_level=1)
    with pytest.raises(ProjectError, match=r"o_proj/MatMulNBits: accuracy_level is 1, not 4"):
        check_export(tmp_path / "onnx", RTN)
    with pytest.raises(ProjectError, match="is quantized"):
        check_export(tmp_path / "onnx", None)


def test_a_cut_data_file_is_noticed(tiny: Path, tmp_path: Path) -> None:
    export_onnx(tiny, tmp_path, precision="fp32")
    data = tmp_path / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(ProjectError, match="the graph needs"):
        check_export(tmp_path, None)


def test_precision_must_fit_the_checkpoint(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointRefused, match="not quantized"):
        export_onnx(tiny, tmp_path, precision="int4")
    quantize_checkpoint(tiny, tmp_path / "int4", RTN)
    with pytest.raises(CheckpointRefused, match="is quantized"):
        export_onnx(tmp_path / "int4", tmp_path / "onnx", precision="fp32")
    with pytest.raises(UserError, match="provider"):
        export_onnx(tiny, tmp_path, precision="fp32", provider="cuda")


@pytest.mark.parametrize("architecture", ["phi-3-mini-4k", "phi-3-mini-128k", "phi-4-mini"])
def test_a_graph_for_a_gpu_is_in_float16_and_runs_without_one(
    architecture: str, tmp_path: Path
) -> None:
    quantize_checkpoint(make_tiny(tmp_path / "float", architecture), tmp_path / "int4", RTN)
    said = []
    for provider, kept in (("cpu", "float32"), ("cuda", "float16")):
        out = tmp_path / provider
        export_onnx(tmp_path / "int4", out, precision="int4", accuracy_level=1, provider=provider)
        assert (kv_cache(out), GenaiConfig.read(out).decoder.provider) == (kept, provider)
        said.append(OnnxLogits(out).logits([np.arange(5, 29, dtype=np.int32)])[0])
    assert said[1].dtype == np.float32
    assert 0 < np.linalg.norm(said[0] - said[1]) < 0.01 * np.linalg.norm(said[0])


def test_keys_and_values_in_int8_are_not_for_a_gpu(tiny: Path, tmp_path: Path) -> None:
    quantize_checkpoint(tiny, tmp_path / "int4", RTN)
    with pytest.raises(UserError, match="int8 are for provider 'cpu'"):
        export_onnx(
            tmp_path / "int4", tmp_path, precision="int4", provider="cuda", kv_sequences=[[5, 6]]
        )


def test_version_2_zero_points_are_refused(tiny: Path, tmp_path: Path) -> None:
    quantize_checkpoint(tiny, tmp_path, RTN)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq_v2"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointRefused, match="gptq_v2"):
        export_onnx(tmp_path, tmp_path / "onnx", precision="int4")
