"""Write a checkpoint of random weights in the real shapes of a Phi-3 model, file by file.

With it anybody can repeat the figures on memory and speed without the real weights, which need a
model hub and gigabytes of traffic. What the model says is noise; how large it is, how long it takes
and how much memory it needs is not.

    python benchmarks/random_checkpoint.py phi-3-mini-4k /tmp/random-phi3
    python benchmarks/random_checkpoint.py phi-3-mini-4k /tmp/random-phi3 --tokenizer REAL_MODEL_DIR

The shapes are those of the published config.json files of microsoft/Phi-3-mini-4k-instruct and its
siblings.
Memory: a few hundred MB whatever the size. Without --tokenizer a byte-level one is written.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

COMMON: dict[str, Any] = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 32000,
    "pad_token_id": 32000,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
_MINI = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "sliding_window": 2047,
}


def _longrope(half: int) -> dict[str, Any]:
    # The published factors rise from 1 to some 2 (short) and 65 (long); these have their shape.
    steps = range(half)
    return {
        "type": "longrope",
        "short_factor": [round(1.0 + 1.0 * i / half, 3) for i in steps],
        "long_factor": [round(1.0 + 64.0 * (i / half) ** 2, 3) for i in steps],
    }


_LONG_MINI = {
    **_MINI,
    "max_position_embeddings": 131072,
    "sliding_window": 262144,
    "rope_scaling": _longrope(48),
}
MODELS: dict[str, dict[str, Any]] = {
    "phi-3-mini-4k": _MINI,
    "phi-3-mini-128k": _LONG_MINI,
    "phi-3.5-mini": _LONG_MINI,
    "phi-3-medium-4k": {
        **_MINI,
        "hidden_size": 5120,
        "intermediate_size": 17920,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 10,
    },
    "phi-4-mini": {
        **_LONG_MINI,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "vocab_size": 200064,
        "partial_rotary_factor": 0.75,
        "tie_word_embeddings": True,
        "bos_token_id": 199999,
        "eos_token_id": 199999,
        "pad_token_id": 199999,
    },
}


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a Phi-3 model, in the order of the computation."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    head = hidden // heads
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden)
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.self_attn.qkv_proj.weight"] = ((heads + 2 * groups) * head, hidden)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (hidden, heads * head)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.mlp.gate_up_proj.weight"] = (2 * inner, hidden)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, inner)
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def write_random_checkpoint(
    model: str,
    out: Path,
    tokenizer: Path | None = None,
    layers: int | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> int:
    """Write the checkpoint, in bfloat16.

    Args:
        model: a key of `MODELS`.
        out: the directory; made if it is not there.
        tokenizer: a directory with the tokenizer files to copy; None writes a byte-level one.
        layers: number of decoder layers, None for as many as the model has.
        seed: of the weights.
        device: that draws them; `cuda` takes seconds, and draws others than `cpu`.

    Returns:
        The bytes of the weights.
    """
    import torch

    from phi3_mlflow.checkpoints.writer import Announced, CheckpointWriter
    from phi3_mlflow.quantization.description import COMPANIONS

    config = {**COMMON, **MODELS[model]}
    config["num_hidden_layers"] = layers or config["num_hidden_layers"]
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shapes = tensor_shapes(config)
    announced = {name: Announced("BF16", shape) for name, shape in shapes.items()}
    generator = torch.Generator(device).manual_seed(seed)
    with CheckpointWriter(out, announced) as writer:
        for name, shape in shapes.items():
            if "norm" in name:
                writer.write(name, torch.ones(shape, dtype=torch.bfloat16))
                continue
            tensor = torch.empty(shape, dtype=torch.bfloat16, device=device)
            for start in range(0, shape[0], 2048):
                tensor[start : start + 2048].normal_(0, 0.02, generator=generator)
            writer.write(name, tensor.cpu())
    if tokenizer is None:
        _byte_level_tokenizer(out, config)
    else:
        for pattern in COMPANIONS:
            for file in tokenizer.glob(pattern):
                shutil.copyfile(file, out / file.name)
    return sum(tensor.nbytes for tensor in announced.values())


def _byte_level_tokenizer(out: Path, config: dict[str, Any]) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    end = config["eos_token_id"]
    vocab = {"<unk>": 0, "<s>": 1, "<|endoftext|>": end}
    if config["bos_token_id"] == end:
        del vocab["<s>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab.update({letter: 2 + i for i, letter in enumerate(letters)})
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    begin = "<s>" if "<s>" in vocab else "<|endoftext|>"
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=begin, eos_token="<|endoftext|>", unk_token="<unk>"
    )
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    fast.save_pretrained(out)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which checkpoint a benchmark takes: random in a model's shapes, or one that is there."""
    parser.add_argument("--model", choices=sorted(MODELS), default="phi-3-mini-4k")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--checkpoint", type=Path, help="one that was written before")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=sorted(MODELS))
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="directory with tokenizer files to copy")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cuda draws the weights on a GPU")
    args = parser.parse_args()
    size = write_random_checkpoint(
        args.model, args.out, args.tokenizer, args.layers, args.seed, args.device
    )
    print(f"{args.out}: {size / 1e9:.2f} GB of random weights in the shapes of {args.model}")


if __name__ == "__main__":
    main()
