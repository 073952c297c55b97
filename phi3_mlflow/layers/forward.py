"""What a checkpoint makes of texts, every layer read once.

The places of all texts lie one after another in one matrix, and only attention knows where a text
begins. So nothing is padded, and a text's states do not depend on what it is computed with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention
from transformers.activations import ACT2FN
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb, repeat_kv

from phi3_mlflow.layers.states import States

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from phi3_mlflow.core.progress import Meter
    from phi3_mlflow.layers.decoder import Decoder

_PART_BYTES = (
    1 << 26
)  # of the widest intermediate result, which decides how many places go together


def work(decoder: Decoder, places: int) -> int:
    """Multiplications that `final_states` tells its meter of, in thousands."""
    return decoder.layers * places * sum(_weights(decoder)) // 1000


def final_states(
    decoder: Decoder,
    pieces: Sequence[torch.Tensor],
    meter: Meter,
    *,
    dtype: torch.dtype = torch.float32,
    folder: Path | None = None,
) -> States:
    """The states that the head sees, at every place of some texts.

    Args:
        decoder: the model.
        pieces: token ids, int64 (S,) each; every piece is a text of its own.
        meter: told the work that is done, `work` in all.
        dtype: what matrices are multiplied in, see `arithmetic`.
        folder: for states that are too many for memory.

    Returns:
        float32 (places of all pieces, hidden), one piece after another.
    """
    tokens = torch.cat(list(pieces))
    states = States(len(tokens), decoder.hidden, folder=folder)
    lengths = [len(piece) for piece in pieces]
    attending, thinking = (weights * len(tokens) // 1000 for weights in _weights(decoder))
    with torch.inference_mode():
        decoder.embed(tokens, states)
        for layer in range(decoder.layers):
            _attention(decoder, layer, states, lengths, dtype)
            meter.advance(attending)
            _mlp(decoder, layer, states, dtype)
            meter.advance(thinking)
        for start, stop in states.parts(4096):
            states.write(start, decoder.norm(states.read(start, stop)))
    return states


def _weights(decoder: Decoder) -> tuple[int, int]:
    """Weights of a layer's attention and of its MLP."""
    config, hidden = decoder.config, decoder.hidden
    width = _head_size(decoder) * config.num_attention_heads
    narrow = _head_size(decoder) * config.num_key_value_heads
    return hidden * (2 * width + 2 * narrow), 3 * hidden * config.intermediate_size


def _head_size(decoder: Decoder) -> int:
    config = decoder.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(size)


def _attention(
    decoder: Decoder, layer: int, states: States, lengths: Sequence[int], dtype: torch.dtype
) -> None:
    """Add what the attention of a layer gives to the states."""
    prefix = f"model.layers.{layer}."
    norm = decoder.reader.read_float(f"{prefix}input_layernorm.weight")
    fused = decoder.reader.read_float(f"{prefix}self_attn.qkv_proj.weight").to(dtype)
    output = decoder.reader.read_float(f"{prefix}self_attn.o_proj.weight").to(dtype)
    start = 0
    for group in _groups(lengths, _part(len(fused))):
        rows = states.read(start, start + sum(group))
        normed = rms_norm(rows, (decoder.hidden,), norm, decoder.config.rms_norm_eps)
        projected = linear(normed.to(dtype), fused).to(torch.float32)
        mixed = [_attend(decoder, part) for part in torch.split(projected, group)]
        rows += linear(torch.cat(mixed).to(dtype), output)
        states.write(start, rows)
        start += sum(group)


def _attend(decoder: Decoder, projected: torch.Tensor) -> torch.Tensor:
    """Attention within one text: (S, queries, keys and values) to (S, heads x head size)."""
    config, size = decoder.config, _head_size(decoder)
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    split = [heads * size, shared * size, shared * size]
    parts = torch.split(projected, split, -1)
    query, key, value = (part.view(1, len(part), -1, size).transpose(1, 2) for part in parts)
    rotate: Any = apply_rotary_pos_emb
    query, key = rotate(query, key, *decoder.rotary(len(projected)))
    mask = decoder.mask(len(projected))
    mixed = scaled_dot_product_attention(
        query,
        repeat_kv(key, heads // shared),
        repeat_kv(value, heads // shared),
        attn_mask=mask,
        is_causal=mask is None,
        scale=size**-0.5,
    )
    return mixed[0].transpose(0, 1).flatten(1)


def _mlp(decoder: Decoder, layer: int, states: States, dtype: torch.dtype) -> None:
    """Add what the MLP of a layer gives to the states."""
    prefix, activate = f"model.layers.{layer}.", ACT2FN[decoder.config.hidden_act]
    norm = decoder.reader.read_float(f"{prefix}post_attention_layernorm.weight")
    fused = decoder.reader.read_float(f"{prefix}mlp.gate_up_proj.weight").to(dtype)
    down = decoder.reader.read_float(f"{prefix}mlp.down_proj.weight").to(dtype)
    for start, stop in states.parts(_part(len(fused))):
        rows = states.read(start, stop)
        normed = rms_norm(rows, (decoder.hidden,), norm, decoder.config.rms_norm_eps)
        gate, up = linear(normed.to(dtype), fused).to(torch.float32).chunk(2, dim=-1)
        rows += linear((activate(gate) * up).to(dtype), down)
        states.write(start, rows)


def _part(width: int) -> int:
    """How many places go through a matrix of `width` outputs together."""
    return max(64, _PART_BYTES // (4 * width))


def _groups(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Texts that follow one another, of `most` places together, or one longer text."""
    group: list[int] = []
    for length in lengths:
        if group and sum(group) + length > most:
            yield group
            group = []
        group.append(length)
    if group:
        yield group
