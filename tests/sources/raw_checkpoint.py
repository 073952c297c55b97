"""Checkpoints written byte by byte, so that a test can also write wrong ones."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from phi3_mlflow.checkpoints.configuration import expected_shapes

SIZES = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1, "I64": 8}


def tiny_config(**more: Any) -> dict[str, Any]:
    """A sound configuration of some 300,000 parameters; a key given as None is left out."""
    config = {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 96,
        "max_position_embeddings": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "original_max_position_embeddings": 128,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "vocab_size": 2048,
    }
    return {
        key: value for key, value in (config | more).items() if key not in more or value is not None
    }


def tiny_tokenizer(tokens: int = 2000) -> dict[str, Any]:
    """The content of a `tokenizer.json` with so many tokens, the last two of them added ones."""
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": tokens - 2, "content": "<|end|>", "special": True},
            {"id": tokens - 1, "content": "<|user|>", "special": True},
        ],
        "model": {"type": "BPE", "vocab": {f"t{i}": i for i in range(tokens - 2)}, "merges": []},
    }


def safetensors_bytes(
    tensors: dict[str, tuple[str, tuple[int, ...]]],
    seed: int = 0,
    change: Callable[[dict[str, Any]], None] | None = None,
) -> bytes:
    """A safetensors file of random bytes.

    Args:
        tensors: dtype and shape by name.
        seed: of the bytes.
        change: may spoil the header before it is written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape) in tensors.items():
        count = SIZES[dtype]
        for dimension in shape:
            count *= dimension
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [position, position + count],
        }
        position += count
    if change:
        change(header)
    return with_header(json.dumps(header).encode(), random.Random(seed).randbytes(position))


def with_header(header: bytes, data: bytes) -> bytes:
    """A safetensors file of a header, padded to 8 bytes, and data."""
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data


def tiny_checkpoint(shards: int = 2, dtype: str = "F32", **config_more: Any) -> dict[str, bytes]:
    """The files of a sound checkpoint by name, in so many shards (1: without an index)."""
    config = tiny_config(**config_more)
    shapes, optional = expected_shapes(config)
    names = [name for name in shapes if name not in optional]
    files = {
        "config.json": json.dumps(config, indent=2).encode(),
        "generation_config.json": b'{"eos_token_id": [2]}',
        "tokenizer.json": json.dumps(tiny_tokenizer()).encode(),
        "tokenizer_config.json": b'{"eos_token": "<|end|>"}',
        "LICENSE": b"Permission is hereby granted, free of charge\n",
    }
    if shards == 1:
        files["model.safetensors"] = safetensors_bytes({n: (dtype, shapes[n]) for n in names})
        return files
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        mine = names[shard::shards]
        files[file] = safetensors_bytes({n: (dtype, shapes[n]) for n in mine}, seed=shard)
        weight_map |= dict.fromkeys(mine, file)
    files["model.safetensors.index.json"] = json.dumps(
        {"metadata": {"total_size": 0}, "weight_map": weight_map}
    ).encode()
    return files


def write_files(directory: Path, files: dict[str, bytes]) -> Path:
    """Write files into a directory, made if it is not there."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        target = directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    return directory
