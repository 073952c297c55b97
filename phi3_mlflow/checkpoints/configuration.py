"""What `config.json` of a Phi-3 model says, and which tensors follow from it.

The shapes are those of `transformers.models.phi3.modeling_phi3`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard

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
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def config_problems(config: Mapping[str, Any]) -> list[str]:
    """Everything that makes a configuration unusable, one line each; empty when it is sound."""
    problems = _architecture_problems(config)
    sizes = _size_problems(config)
    problems += sizes
    if not sizes:
        problems += _relation_problems(config)
        problems += _token_problems(config)
        problems += _rope_problems(config)
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
    for key in _TOKEN_IDS:
        value = config.get(key)
        for token in value if isinstance(value, list) else [value]:
            if token is not None and not (is_count(token) and token < config["vocab_size"]):
                problems.append(
                    f"config.json: {key} {_brief(token)} is not a row of the embedding, which has "
                    f"{config['vocab_size']}"
                )
    return problems


def _rope_problems(config: Mapping[str, Any]) -> list[str]:
    """Rotary scaling that does not have one factor per pair of rotated elements."""
    scaling = config.get("rope_scaling")
    if scaling is None:
        return []
    if not isinstance(scaling, dict):
        return [f"config.json: rope_scaling is {_brief(scaling)}, it must be an object or null"]
    partial = scaling.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if not _is_number(partial) or not 0 < partial <= 1:
        return [f"config.json: partial_rotary_factor is {_brief(partial)}, it must be 0 to 1"]
    pairs = int(head_size(config) * partial) // 2
    problems = []
    for key in ("short_factor", "long_factor"):
        factors = scaling.get(key)
        if factors is None:
            continue
        if not isinstance(factors, list) or not all(map(_is_number, factors)):
            problems.append(f"config.json: rope_scaling.{key} is not a list of numbers")
        elif len(factors) != pairs:
            problems.append(
                f"config.json: rope_scaling.{key} has {len(factors)} factors, {pairs} are needed"
            )
    return problems


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
