"""What `config.json` of a Phi-3 model says, and which tensors follow from it.

The shapes are those of `transformers.models.phi3.modeling_phi3`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard

from phi3_mlflow.checkpoints.rope import read_rope

if TYPE_CHECKING:
    from collections.abc import Mapping

ARCHITECTURE = "Phi3ForCausalLM"
MODEL_TYPE = "phi3"

_LARGEST = {
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 19,
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "vocab_size": 1 << 23,
    "max_position_embeddings": 1 << 24,
}
_ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "relu")
TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": 32_000, "pad_token_id": 32_000}
"""What transformers takes where one of them is not named."""

DTYPE_KEYS = ("dtype", "torch_dtype")
"""Where the dtype of the weights is named: as transformers 5 writes it, and as 4 did."""
_DTYPES = ("float32", "float16", "bfloat16")


def config_problems(config: Mapping[str, Any]) -> list[str]:
    """Everything that makes a configuration unusable, one line each; empty when it is sound."""
    problems = _architecture_problems(config)
    sizes = _size_problems(config)
    problems += sizes
    if not sizes:
        problems += _relation_problems(config)
        problems += _token_problems(config)
        problems += read_rope(config)[1]
    problems += _window_problems(config)
    problems += _dtype_problems(config)
    if not isinstance(config.get("tie_word_embeddings", False), bool):
        problems.append("config.json: tie_word_embeddings is neither true nor false")
    if config.get("hidden_act", "silu") not in _ACTIVATIONS:
        problems.append(
            f"config.json: hidden_act {config['hidden_act']!r} is not among "
            f"{', '.join(_ACTIVATIONS)}"
        )
    if config.get("quantization_config") is not None:
        problems.append("config.json: the weights are quantized already; a float one is needed")
    return problems


def expected_shapes(config: Mapping[str, Any]) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """The tensors of a sound configuration.

    Args:
        config: one without `config_problems`.

    Returns:
        The shape of every tensor by name, and the names that may be missing: a head that shares
        its weights with the embedding.
    """
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    intermediate, head = config["intermediate_size"], head_size(config)
    heads, kv_heads = config["num_attention_heads"], key_value_heads(config)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
            f"{prefix}.self_attn.qkv_proj.weight": ((heads + 2 * kv_heads) * head, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, heads * head),
            f"{prefix}.mlp.gate_up_proj.weight": (2 * intermediate, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, intermediate),
        }
    return shapes, ({"lm_head.weight"} if config.get("tie_word_embeddings", False) else set())


def head_size(config: Mapping[str, Any]) -> int:
    """Elements of one attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def key_value_heads(config: Mapping[str, Any]) -> int:
    """Heads of keys and values; as many as of queries when the configuration does not say."""
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


def is_count(value: Any) -> TypeGuard[int]:
    """Whether a JSON value is a whole number of at least 0; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _architecture_problems(config: Mapping[str, Any]) -> list[str]:
    problems = []
    if config.get("architectures") != [ARCHITECTURE]:
        problems.append(
            f"config.json: architectures is {_brief(config.get('architectures'))}, only "
            f"[{ARCHITECTURE!r}] is supported"
        )
    if config.get("model_type") != MODEL_TYPE:
        problems.append(
            f"config.json: model_type is {_brief(config.get('model_type'))}, only "
            f"{MODEL_TYPE!r} is supported"
        )
    return problems


def _size_problems(config: Mapping[str, Any]) -> list[str]:
    problems = []
    for key, largest in _LARGEST.items():
        value = config.get(key)
        if value is None and key == "num_key_value_heads":
            continue
        if not is_count(value) or not 1 <= value <= largest:
            problems.append(f"config.json: {key} is {_brief(value)}, it must be 1 to {largest}")
    head = config.get("head_dim")
    if head is not None and (not is_count(head) or not 1 <= head <= 1 << 12):
        problems.append(f"config.json: head_dim is {_brief(head)}, it must be 1 to {1 << 12}")
    return problems


def _relation_problems(config: Mapping[str, Any]) -> list[str]:
    problems = []
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if config.get("head_dim") is None and hidden % heads:
        problems.append(f"config.json: hidden_size {hidden} is not a multiple of {heads} heads")
    if heads % key_value_heads(config):
        problems.append(
            f"config.json: {heads} attention heads are not a multiple of "
            f"{key_value_heads(config)} key-value heads"
        )
    if head_size(config) % 2:
        problems.append(f"config.json: rotary heads of odd size {head_size(config)}")
    return problems


def _token_problems(config: Mapping[str, Any]) -> list[str]:
    """Token ids that the embedding has no row for."""
    problems = []
    for key, default in TOKEN_IDS.items():
        problems += token_problems("config.json", key, config.get(key), config["vocab_size"])
        if key not in config and default >= config["vocab_size"]:
            problems.append(
                f"config.json: {key} is missing, and {default}, which transformers takes then, is "
                f"not a row of the embedding, which has {config['vocab_size']}"
            )
    return problems


def token_problems(file: str, key: str, value: Any, rows: int) -> list[str]:
    """Token ids of a file that the embedding has no row for: a number, a list of them or null."""
    return [
        f"{file}: {key} {_brief(token)} is not a row of the embedding, which has {rows}"
        for token in (value if isinstance(value, list) else [value])
        if token is not None and not (is_count(token) and token < rows)
    ]


def stated_dtype(value: Any) -> str | None:
    """The dtype that a configuration names, in plain words; None where it leaves it open."""
    if value in (None, "auto"):
        return None
    return str(value).removeprefix("torch.")


def _window_problems(config: Mapping[str, Any]) -> list[str]:
    window = config.get("sliding_window")
    if window is None or (is_count(window) and window > 0):
        return []
    return [
        f"config.json: sliding_window is {_brief(window)}, it must be above 0, or null for none"
    ]


def _dtype_problems(config: Mapping[str, Any]) -> list[str]:
    said = {key: stated_dtype(config.get(key)) for key in DTYPE_KEYS}
    problems = [
        f"config.json: {key} is {_brief(config[key])}, allowed are {', '.join(_DTYPES)}"
        for key, dtype in said.items()
        if dtype is not None and dtype not in _DTYPES
    ]
    if not problems and len({dtype for dtype in said.values() if dtype}) > 1:
        problems.append(
            "config.json: "
            + " and ".join(f"{key} {dtype}" for key, dtype in said.items())
            + " differ; remove the one that does not hold"
        )
    return problems


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
