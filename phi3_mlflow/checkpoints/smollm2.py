"""Turn a Llama-architecture GGUF file into a Hugging Face checkpoint in Phi-3's architecture.

Phi-3's decoder block is Llama's with two pairs of projections stored as one: `qkv_proj` is the
rows of q, k and v one under another, `gate_up_proj` those of gate and up. Everything else is the
same function, so the converted model computes the same logits, to the last bit.

GGUF: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from phi3_mlflow.core.errors import CheckpointRefused

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt
    from gguf import GGUFReader

_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL


def convert_gguf(gguf_file: Path, out: Path) -> None:
    """Write the checkpoint of a Llama GGUF file, as `Phi3ForCausalLM`, into a directory.

    Args:
        gguf_file: a GGUF file of architecture `llama` with a byte-level BPE (`gpt2`) vocabulary.
        out: an existing directory; gets `model.safetensors` (float32), `config.json`,
            `generation_config.json` and the tokenizer files.

    Raises:
        CheckpointRefused: the file is not a GGUF file, or of another architecture or vocabulary.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(str(gguf_file))
    except (ValueError, OSError, IndexError) as error:
        raise CheckpointRefused(f"{gguf_file.name} is not a readable GGUF file: {error}") from error
    _require(reader, gguf_file, "general.architecture", "llama")
    _require(reader, gguf_file, "tokenizer.ggml.model", "gpt2")
    config = _config(reader)
    _write_json(out / "config.json", config)
    _write_json(
        out / "generation_config.json",
        {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    _write_tokenizer(reader, out, config)
    _write_weights(reader, out / "model.safetensors", config)


def _field(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise CheckpointRefused(f"the GGUF file has no metadata key {key!r}")
    return field.contents()


def _require(reader: GGUFReader, file: Path, key: str, expected: str) -> None:
    found = _field(reader, key)
    if found != expected:
        raise CheckpointRefused(f"{file.name}: {key} is {found!r}, only {expected!r} is supported")


def _config(reader: GGUFReader) -> dict[str, Any]:
    """The `config.json` of the model as Phi3ForCausalLM."""
    context = int(_field(reader, "llama.context_length"))
    heads = int(_field(reader, "llama.attention.head_count"))
    eos = int(_field(reader, "tokenizer.ggml.eos_token_id"))
    return {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": int(_field(reader, "tokenizer.ggml.bos_token_id")),
        "embd_pdrop": 0.0,
        "eos_token_id": eos,
        "hidden_act": "silu",
        "hidden_size": int(_field(reader, "llama.embedding_length")),
        "initializer_range": 0.02,
        "intermediate_size": int(_field(reader, "llama.feed_forward_length")),
        "max_position_embeddings": context,
        "num_attention_heads": heads,
        "num_hidden_layers": int(_field(reader, "llama.block_count")),
        "num_key_value_heads": int(_field(reader, "llama.attention.head_count_kv")),
        "original_max_position_embeddings": context,
        "pad_token_id": eos,
        "resid_pdrop": 0.0,
        # GGUF stores the value as float32; its shortest decimal form is what config.json had.
        "rms_norm_eps": float(f"{_field(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_scaling": None,
        "rope_theta": float(_field(reader, "llama.rope.freq_base")),
        "sliding_window": None,
        "tie_word_embeddings": not any(t.name == "output.weight" for t in reader.tensors),
        "dtype": "float32",
        "use_cache": True,
        "vocab_size": len(_field(reader, "tokenizer.ggml.tokens")),
    }


def _write_weights(reader: GGUFReader, file: Path, config: Mapping[str, Any]) -> None:
    """Dequantize every tensor to float32 and store it under Phi-3's name."""
    import numpy as np
    from gguf.quants import dequantize
    from safetensors.numpy import save_file

    stored = {tensor.name: tensor for tensor in reader.tensors}

    def load(name: str, heads: int = 0) -> npt.NDArray[np.float32]:
        if name not in stored:
            raise CheckpointRefused(f"the GGUF file has no tensor {name!r}")
        tensor = stored[name]
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        return _unpermute(values, heads) if heads else values

    q_heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    tensors = {
        "model.embed_tokens.weight": load("token_embd.weight"),
        "model.norm.weight": load("output_norm.weight"),
    }
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = load("output.weight")
    for layer in range(config["num_hidden_layers"]):
        source, target = f"blk.{layer}", f"model.layers.{layer}"
        tensors[f"{target}.input_layernorm.weight"] = load(f"{source}.attn_norm.weight")
        tensors[f"{target}.post_attention_layernorm.weight"] = load(f"{source}.ffn_norm.weight")
        tensors[f"{target}.self_attn.qkv_proj.weight"] = np.concatenate(
            [
                load(f"{source}.attn_q.weight", q_heads),
                load(f"{source}.attn_k.weight", kv_heads),
                load(f"{source}.attn_v.weight"),
            ]
        )
        tensors[f"{target}.self_attn.o_proj.weight"] = load(f"{source}.attn_output.weight")
        tensors[f"{target}.mlp.gate_up_proj.weight"] = np.concatenate(
            [load(f"{source}.ffn_gate.weight"), load(f"{source}.ffn_up.weight")]
        )
        tensors[f"{target}.mlp.down_proj.weight"] = load(f"{source}.ffn_down.weight")
    save_file(tensors, str(file), metadata={"format": "pt"})


def _unpermute(weight: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Undo llama.cpp's reordering of the rotary rows of a q or k projection.

    llama.cpp interleaves the two halves of every head (its rotary embedding turns neighbouring
    rows); transformers turns row i with row i + head_size / 2.

    Args:
        weight: (heads * head_size, hidden) rows in llama.cpp's order.
        heads: how many heads the rows belong to.

    Returns:
        The same rows in transformers' order.
    """
    half = weight.shape[0] // heads // 2
    return (
        weight.reshape(heads, half, 2, *weight.shape[1:])
        .swapaxes(1, 2)
        .reshape(weight.shape)
        .copy()
    )


def _write_tokenizer(reader: GGUFReader, out: Path, config: Mapping[str, Any]) -> None:
    """Build the byte-level BPE from the vocabulary and merges; both runtimes read it alike.

    transformers' own GGUF conversion yields a tokenizer class that onnxruntime-genai reads wrongly.
    """
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")
    kinds: list[int] = _field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = ByteLevelDecoder()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in special]
    )
    tokenizer.save(str(out / "tokenizer.json"))
    # onnxruntime-genai reads these two when there is no merge list it understands in the JSON.
    _write_json(out / "vocab.json", {token: i for i, token in enumerate(tokens)})
    (out / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *(" ".join(merge) for merge in merges)]) + "\n", "utf-8"
    )
    end, start = tokens[config["eos_token_id"]], tokens[config["bos_token_id"]]
    unknown = tokens[int(_field(reader, "tokenizer.ggml.unknown_token_id"))]
    _write_json(
        out / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(tokens.index(token)): {
                    "content": token,
                    "lstrip": False,
                    "normalized": False,
                    "rstrip": False,
                    "single_word": False,
                    "special": True,
                }
                for token in special
            },
            "bos_token": start,
            "chat_template": _field(reader, "tokenizer.chat_template"),
            "clean_up_tokenization_spaces": False,
            "eos_token": end,
            "model_max_length": config["max_position_embeddings"],
            "pad_token": end,
            "tokenizer_class": "GPT2Tokenizer",
            "unk_token": unknown,
        },
    )
    _write_json(
        out / "special_tokens_map.json",
        {"bos_token": start, "eos_token": end, "pad_token": end, "unk_token": unknown},
    )


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
