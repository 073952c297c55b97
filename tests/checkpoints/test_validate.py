"""A sound Phi-3 checkpoint passes; everything that must not be loaded is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phi3_mlflow.checkpoints.configuration import expected_shapes
from phi3_mlflow.checkpoints.remote_code import drop_remote_code, references_to_code
from phi3_mlflow.checkpoints.validate import validate_checkpoint
from phi3_mlflow.core.errors import CheckpointRefused
from tests.fixtures.tiny_phi3 import ARCHITECTURES, make_tiny
from tests.sources.raw_checkpoint import (
    safetensors_bytes,
    tiny_checkpoint,
    tiny_config,
    tiny_tokenizer,
    write_files,
)

SHARD, OTHER = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_files(tmp_path / "checkpoint", tiny_checkpoint())


def edit(file: Path, **values: Any) -> None:
    """Change keys of a JSON file; None takes one out."""
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointRefused) as refused:
        validate_checkpoint(directory)
    assert refused.value.exit_code == 2
    return str(refused.value)


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_what_it_says_of_a_sound_one(tmp_path: Path, shards: int, tied: bool, dtype: str) -> None:
    files = tiny_checkpoint(shards, dtype, tie_word_embeddings=tied)
    info = validate_checkpoint(write_files(tmp_path, files))
    shapes, optional = expected_shapes(tiny_config(tie_word_embeddings=tied))
    assert set(info.tensors) == set(shapes) - optional
    assert {
        name: entry.shape for name, (_, entry) in info.tensors.items()
    }.items() <= shapes.items()
    assert info.architecture == "Phi3ForCausalLM"
    assert info.dtypes == {dtype: len(info.tensors)}
    assert info.nbytes == info.parameters * {"F32": 4, "BF16": 2}[dtype]
    assert info.parameters == 2048 * 64 * (1 if tied else 2) + 2 * 64 * 2 + 64 + 2 * (
        (4 + 2 * 2) * 16 * 64 + 64 * 64 + 2 * 96 * 64 + 64 * 96
    )
    assert info.vocabulary == 2000
    assert info.config["hidden_size"] == 64


@pytest.mark.slow
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_what_transformers_saves_passes(tmp_path: Path, architecture: str) -> None:
    assert validate_checkpoint(make_tiny(tmp_path / "tiny", architecture)).parameters > 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "architectures is ['LlamaForCausalLM']"),
        ({"architectures": None}, "architectures is None"),
        ({"model_type": "phi3small"}, "model_type is 'phi3small'"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"hidden_size": 64.5}, "hidden_size is 64.5"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"num_attention_heads": 5}, "not a multiple of 5 heads"),
        ({"num_key_value_heads": 3}, "not a multiple of 3 key-value heads"),
        ({"head_dim": -1}, "head_dim is -1"),
        ({"eos_token_id": [2, 2048]}, "eos_token_id 2048 is not a row"),
        ({"pad_token_id": -1}, "pad_token_id -1 is not a row"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is neither"),
        ({"hidden_act": "exec"}, "hidden_act 'exec'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized already"),
        ({"auto_map": {"AutoModel": "modeling.Model"}}, "config.json: auto_map"),
        ({"custom_pipelines": {"x": {"impl": "p.P"}}}, "config.json: custom_pipelines"),
        ({"text_config": {"auto_map": {"A": "b.C"}}}, "config.json: text_config.auto_map"),
        ({"_attn_implementation": "owner/kernel"}, "_attn_implementation"),
        ({"rope_scaling": "longrope"}, "rope_scaling is 'longrope'"),
        ({"rope_scaling": {"short_factor": [1.0] * 7}}, "short_factor has 7 factors, 8 are needed"),
        ({"rope_scaling": {"long_factor": ["1"] * 8}}, "long_factor is not a list of numbers"),
        ({"rope_scaling": {}, "partial_rotary_factor": 2}, "partial_rotary_factor is 2"),
        ({"hidden_size": 128}, "needs (2048, 128), found (2048, 64)"),
        ({"num_hidden_layers": 3}, "'model.layers.2.input_layernorm.weight' of shape (64,)"),
        ({"num_hidden_layers": 1}, "'model.layers.1.mlp.down_proj.weight' is not part of"),
        ({"tie_word_embeddings": True, "intermediate_size": 97}, "needs (194, 64), found"),
    ],
)
def test_wrong_configurations(directory: Path, values: dict[str, Any], message: str) -> None:
    edit(directory / "config.json", **values)
    assert message in refusal(directory)


def test_every_problem_is_listed_at_once(directory: Path) -> None:
    edit(directory / "config.json", intermediate_size=128, auto_map={"A": "b.C"})
    (directory / "tokenizer.json").write_text(json.dumps(tiny_tokenizer(3000)))
    text = refusal(directory)
    assert "auto_map" in text
    assert text.count("gate_up_proj") == 2
    assert "the embedding has 2048 rows" in text
    assert "remote_code: drop" in text


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.PT", "sub/deep/optimizer.pkl"])
def test_pickles(directory: Path, name: str) -> None:
    write_files(directory, {name: b"\x80\x04"})
    assert f"{name} is in a format that can run code" in refusal(directory)


def test_code(directory: Path) -> None:
    write_files(directory, {"modeling_phi3.py": b"import os"})
    assert "modeling_phi3.py is code" in refusal(directory)


def test_only_pickled_weights(directory: Path) -> None:
    for name in (SHARD, OTHER, INDEX):
        (directory / name).unlink()
    assert "there are no weights" in refusal(directory)


@pytest.mark.parametrize("target", ["../outside", "/etc/passwd", "LICENSE", "nowhere"])
def test_links(directory: Path, target: str) -> None:
    (directory / "merges.txt").symlink_to(target)
    assert f"merges.txt is a link to {target}" in refusal(directory)


def test_a_linked_folder_is_not_entered(directory: Path) -> None:
    (directory / "sub").symlink_to("/")
    assert "sub is a link to /" in refusal(directory)


def test_no_directory(tmp_path: Path) -> None:
    assert "there is no checkpoint directory" in refusal(tmp_path / "nothing")


def test_no_configuration(directory: Path) -> None:
    (directory / "config.json").unlink()
    assert "config.json is missing" in refusal(directory)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 10**6])
def test_a_configuration_that_is_none(directory: Path, content: bytes) -> None:
    (directory / "config.json").write_bytes(content)
    assert "config.json" in refusal(directory)


def test_a_key_twice_is_how_phi_3_was_published(directory: Path) -> None:
    text = (directory / "config.json").read_text()
    (directory / "config.json").write_text(text.replace("{", '{"attention_bias": false,', 1))
    assert validate_checkpoint(directory).config["attention_bias"] is False


def test_integers_as_weights(tmp_path: Path) -> None:
    write_files(tmp_path, tiny_checkpoint(1, dtype="I8"))
    assert "dtype I8, allowed are BF16, F16, F32" in refusal(tmp_path)


def test_a_tensor_in_two_files(directory: Path) -> None:
    (directory / OTHER).write_bytes((directory / SHARD).read_bytes())
    assert f"is in {SHARD} and in {OTHER}" in refusal(directory)


def test_a_tensor_that_is_not_indexed(directory: Path) -> None:
    index = json.loads((directory / INDEX).read_text())
    del index["weight_map"]["model.norm.weight"]
    (directory / INDEX).write_text(json.dumps(index))
    assert f"is not in {INDEX}" in refusal(directory)


def test_an_index_that_lies(directory: Path) -> None:
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = SHARD
    index["weight_map"]["model.more.weight"] = SHARD
    (directory / INDEX).write_text(json.dumps(index))
    text = refusal(directory)
    assert f"'model.norm.weight' is in {SHARD}, it is in {OTHER}" in text
    assert "'model.more.weight' is in" in text


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/x.safetensors", "x.bin", 3, ".x.safetensors"]
)
def test_an_index_that_leaves(directory: Path, name: Any) -> None:
    (directory / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    assert "only .safetensors files in the same directory" in refusal(directory)


def test_an_index_without_a_map(directory: Path) -> None:
    (directory / INDEX).write_text("{}")
    assert "no 'weight_map'" in refusal(directory)


def test_a_lying_header(directory: Path) -> None:
    def lie(header: dict[str, Any]) -> None:
        header["a"]["shape"] = [5]

    (directory / SHARD).write_bytes(safetensors_bytes({"a": ("F32", (4,))}, change=lie))
    assert f"{SHARD} has a safetensors header that does not hold" in refusal(directory)


def tokenizer(change: Callable[[dict[str, Any]], Any]) -> bytes:
    content = tiny_tokenizer()
    change(content)
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{}", "no vocabulary"),
        ("tokenizer.json", b"<html>", "not JSON"),
        ("tokenizer.json", tokenizer(lambda t: t["model"].update(vocab=3)), "no vocabulary"),
        (
            "tokenizer.json",
            tokenizer(lambda t: t["model"]["vocab"].update(t1=2048)),
            "token ids up to 2048, the embedding has 2048 rows: 1 tokens have none",
        ),
        (
            "tokenizer.json",
            tokenizer(lambda t: t["model"]["vocab"].update(t1="1")),
            "'1' is not a token id",
        ),
        ("tokenizer.json", tokenizer(lambda t: t["model"]["vocab"].update(t1=2)), "the same id"),
        (
            "tokenizer.json",
            tokenizer(lambda t: t["added_tokens"].append({"id": 9999, "content": "x"})),
            "tokenizer.json, added_tokens: token ids up to 9999",
        ),
        ("tokenizer.json", tokenizer(lambda t: t.update(added_tokens=[1])), "not a list of tokens"),
        ("added_tokens.json", b'{"<|x|>": 5000}', "added_tokens.json: token ids up to 5000"),
        ("vocab.json", b'{"x": -1}', "vocab.json: -1 is not a token id"),
        ("vocab.json", b'{"x": ""}', "vocab.json: '' is not a token id"),
        ("vocab.json", b'{"x": null}', "vocab.json: None is not a token id"),
        (
            "tokenizer_config.json",
            b'{"added_tokens_decoder": {"7000": {"content": "x"}}}',
            "tokenizer_config.json, added_tokens_decoder: token ids up to 7000",
        ),
    ],
)
def test_tokenizers_that_do_not_fit(
    directory: Path, name: str, content: bytes, message: str
) -> None:
    (directory / name).write_bytes(content)
    assert message in refusal(directory)


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    write_files(tmp_path, tiny_checkpoint(1, vocab_size=16384))
    assert "do not belong together" in refusal(tmp_path)


def test_references_to_code_are_found_anywhere() -> None:
    config = {
        "auto_map": {"A": "b.C"},
        "deep": [{"auto_map": {"A": "b.C"}}, {"attn_implementation": {"": "owner/kernel"}}],
        "attn_implementation": "sdpa",
        "trust_remote_code": False,
        "custom_pipelines": {},
    }
    assert references_to_code(config) == [
        "auto_map",
        "deep[0].auto_map",
        "deep[1].attn_implementation",
    ]


def test_dropping_leaves_other_files_alone(directory: Path) -> None:
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert drop_remote_code(directory) == {}
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    edit(directory / "tokenizer_config.json", auto_map={"AutoTokenizer": ["t.T", None]})
    assert drop_remote_code(directory) == {"tokenizer_config.json": ["auto_map"]}
    assert json.loads((directory / "tokenizer_config.json").read_bytes()) == {
        "eos_token": "<|end|>"
    }
