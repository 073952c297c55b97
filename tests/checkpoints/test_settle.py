"""What readers would differ about is put straight at the fetch; what is sound stays as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from phi3_mlflow.checkpoints.layout import INDEX, SINGLE
from phi3_mlflow.checkpoints.reader import CheckpointReader
from phi3_mlflow.checkpoints.settle import HEAD, has_own_head, settle_checkpoint
from phi3_mlflow.core.errors import CheckpointRefused
from phi3_mlflow.core.progress import no_progress
from phi3_mlflow.genai.export import export_onnx
from phi3_mlflow.quantization.quantize import quantize_checkpoint
from phi3_mlflow.quantization.settings import RtnSettings
from phi3_mlflow.sources.common import FetchedSource
from phi3_mlflow.sources.fetch import fetch_source, resolve_revision
from phi3_mlflow.sources.spec import parse_source
from tests.fixtures.tiny_phi3 import make_tiny

EMBEDDING = "model.embed_tokens.weight"


def fetched(source: Path, out: Path) -> FetchedSource:
    out.mkdir()
    return fetch_source(
        parse_source(f"file:{source}"),
        out,
        sha256={},
        base_dir=source,
        downloads=out.with_name(f"{out.name}-downloads"),
        progress=no_progress,
    )


def edit(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tied") / "plain", "phi-4-mini")


@pytest.fixture
def own_head(tied: Path, tmp_path: Path) -> Path:
    """Said to be tied, with a head that was trained apart, as fine-tuning tools leave it."""
    folder = shutil.copytree(tied, tmp_path / "own_head")
    tensors = load_file(folder / SINGLE)
    torch.manual_seed(1)
    tensors[HEAD] = torch.randn_like(tensors[EMBEDDING]) * 0.3
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    return folder


def test_a_head_that_was_trained_apart_is_the_one_that_answers(
    own_head: Path, tmp_path: Path
) -> None:
    from tests.genai.test_export import _load, _onnx_logits, _tokens, _torch_logits

    changes = fetched(own_head, tmp_path / "checkpoint").changes
    assert any("tie_word_embeddings is false now" in change for change in changes)
    export_onnx(tmp_path / "checkpoint", tmp_path / "onnx", precision="fp32")
    tokens = _tokens(20)
    found = _onnx_logits(tmp_path / "onnx", tokens)
    for folder in (own_head, tmp_path / "checkpoint"):
        assert np.abs(found - _torch_logits(_load(folder), tokens)).max() < 1e-4
    report = quantize_checkpoint(tmp_path / "checkpoint", tmp_path / "int4", RtnSettings())
    assert report.bytes_out
    quantized = CheckpointReader(tmp_path / "int4")
    assert "lm_head.qweight" in quantized
    assert EMBEDDING in quantized


def test_steps_that_are_given_such_a_folder_refuse_it(own_head: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointRefused, match="differs from the embedding"):
        quantize_checkpoint(own_head, tmp_path / "int4", RtnSettings())
    with pytest.raises(CheckpointRefused, match="differs from the embedding"):
        export_onnx(own_head, tmp_path / "onnx", precision="fp32")


def test_a_stored_head_that_is_the_embedding_is_no_head_of_its_own(
    tied: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tied, tmp_path / "same")
    tensors = load_file(folder / SINGLE)
    tensors[HEAD] = tensors[EMBEDDING].clone()
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    assert not has_own_head({"tie_word_embeddings": True}, CheckpointReader(folder))
    before = (folder / "config.json").read_bytes()
    assert settle_checkpoint(folder) == []
    assert (folder / "config.json").read_bytes() == before
    export_onnx(folder, tmp_path / "onnx", precision="fp32")


def test_tensors_that_no_graph_would_hold_are_refused(tied: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tied, tmp_path / "biased")
    tensors = load_file(folder / SINGLE)
    tensors["model.layers.0.self_attn.qkv_proj.bias"] = torch.ones(256)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    with pytest.raises(CheckpointRefused, match=r"qkv_proj\.bias"):
        export_onnx(folder, tmp_path / "onnx", precision="fp32")


@pytest.mark.parametrize("shards_are_there", [True, False])
def test_the_single_file_goes_before_a_stale_index(
    tied: Path, tmp_path: Path, shards_are_there: bool
) -> None:
    old = make_tiny(tmp_path / "folder", "phi-4-mini", seed=7, shard="60KB")
    assert (old / INDEX).is_file()
    if not shards_are_there:
        for shard in old.glob("model-*.safetensors"):
            shard.unlink()
    shutil.copy(tied / SINGLE, old / SINGLE)
    assert resolve_revision(parse_source(f"file:{old}"))
    files = fetched(old, tmp_path / "out").files
    assert {name for name in files if "safetensors" in name} == {SINGLE}
    assert (tmp_path / "out" / SINGLE).read_bytes() == (tied / SINGLE).read_bytes()
    # A folder that is named to a later step is read by the same rule.
    assert {CheckpointReader(old).entry(name).file.name for name in CheckpointReader(old)} == {
        SINGLE
    }


def test_an_index_without_its_files_says_what_it_is(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "folder", "phi-4-mini", shard="60KB")
    next(folder.glob("model-*.safetensors")).unlink()
    with pytest.raises(CheckpointRefused, match="the index is stale"):
        fetched(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("values", "plain"),
    [
        ({"dtype": "float32"}, None),
        ({"dtype": "torch.bfloat16"}, {"dtype": "bfloat16"}),
        ({"torch_dtype": "auto"}, {}),
        ({"torch_dtype": None}, {}),
        ({"dtype": "float16", "torch_dtype": "torch.float16"},
         {"dtype": "float16", "torch_dtype": "float16"}),
    ],
)  # fmt: skip
def test_the_dtype_is_spelled_plainly(
    tied: Path, tmp_path: Path, values: dict[str, Any], plain: dict[str, str] | None
) -> None:
    folder = shutil.copytree(tied, tmp_path / "raw")
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(config | values))
    before = (folder / "config.json").read_bytes()
    changes = fetched(folder, tmp_path / "out").changes
    after = (tmp_path / "out" / "config.json").read_bytes()
    assert bool(changes) == (plain is not None) == (before != after)
    found = json.loads(after)
    kept = {key: found[key] for key in ("dtype", "torch_dtype") if key in found}
    assert kept == (values if plain is None else plain)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dtype": "float16", "torch_dtype": "bfloat16"}, "differ"),
        ({"torch_dtype": "int8"}, "torch_dtype is 'int8'"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"sliding_window": "64"}, "sliding_window is '64'"),
        ({"eos_token_id": [2, "3"]}, "eos_token_id '3'"),
    ],
)
def test_what_means_nothing_is_refused(
    tied: Path, tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    folder = shutil.copytree(tied, tmp_path / "raw")
    edit(folder, **values)
    with pytest.raises(CheckpointRefused) as refused:
        fetched(folder, tmp_path / "out")
    assert message in str(refused.value)


def test_a_missing_end_is_not_taken_for_token_32000(tied: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tied, tmp_path / "raw")
    config = json.loads((folder / "config.json").read_text())
    del config["eos_token_id"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointRefused, match="eos_token_id is missing, and 32000"):
        fetched(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "generation_config.json is not JSON"), (b'{"eos_token_id": 320}', "320 is not a row")],
)
def test_a_generation_config_that_lies(
    tied: Path, tmp_path: Path, content: bytes, message: str
) -> None:
    folder = shutil.copytree(tied, tmp_path / "raw")
    (folder / "generation_config.json").write_bytes(content)
    with pytest.raises(CheckpointRefused) as refused:
        fetched(folder, tmp_path / "out")
    assert message in str(refused.value)
