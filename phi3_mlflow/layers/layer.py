"""What one decoder layer does with the states of texts, with its weights in memory.

The places of all texts lie one after another in one matrix, and only attention knows where a text
begins. Gradients pass through where torch keeps track of them; the weights themselves have none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention
from transformers.activations import ACT2FN
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb, repeat_kv

if TYPE_CHECKING:
    from phi3_mlflow.layers.decoder import Decoder

BEFORE_ATTENTION, QKV, OUTPUT = "input_layernorm", "self_attn.qkv_proj", "self_attn.o_proj"
BEFORE_MLP, GATE_UP, DOWN = "post_attention_layernorm", "mlp.gate_up_proj", "mlp.down_proj"
ATTENTION = (BEFORE_ATTENTION, QKV, OUTPUT)
MLP = (BEFORE_MLP, GATE_UP, DOWN)

Adapt = Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]
"""Adds to a product what an adapter makes of the same input; it may change the product in place.

Takes the name of the matrix in the checkpoint, its input (places, in) and the product (places,
out), both float32.
"""

_PART_BYTES = (
    1 << 26
)  # of the widest intermediate result, which decides how many places go together


class Layer:
    """Weights of a decoder layer, read when this is made.

    Args:
        decoder: the model.
        number: of the layer.
        modules: which of its weights; `ATTENTION`, `MLP` or both.
        dtype: what matrices are multiplied in.
        adapt: what is added to the products.
    """

    def __init__(
        self,
        decoder: Decoder,
        number: int,
        modules: Sequence[str],
        *,
        dtype: torch.dtype = torch.float32,
        adapt: Adapt | None = None,
    ) -> None:
        self._decoder, self._number = decoder, number
        self._dtype, self._adapt = dtype, adapt
        self._names = {module: f"model.layers.{number}.{module}.weight" for module in modules}
        self._weights = {module: self._read(module) for module in modules}

    def _read(self, module: str) -> torch.Tensor:
        weight = self._decoder.reader.read_float(self._names[module])
        return weight.to(self._dtype) if weight.dim() == 2 else weight

    def width(self, module: str) -> int:
        """Outputs of a projection."""
        return len(self._weights[module])

    def places_kept(self, size: int) -> int:
        """Places of which attention leaves so many bytes for the backward pass."""
        hidden, width = self._decoder.hidden, self.width(QKV)
        return max(1, size // (4 * (2 * width + 4 * hidden)))

    def attention(self, rows: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """What attention adds to the states of whole texts.

        Args:
            rows: (places, hidden), float32.
            lengths: places of each text.
        """
        projected = self._product(QKV, self._normed(BEFORE_ATTENTION, rows))
        mixed = [attend(self._decoder, part) for part in torch.split(projected, list(lengths))]
        del projected
        return self._product(OUTPUT, torch.cat(mixed) if len(mixed) > 1 else mixed[0])

    def mlp(self, rows: torch.Tensor) -> torch.Tensor:
        """What the MLP adds to states (places, hidden), float32."""
        activate = ACT2FN[self._decoder.config.hidden_act]
        gate, up = self._product(GATE_UP, self._normed(BEFORE_MLP, rows)).chunk(2, dim=-1)
        return self._product(DOWN, activate(gate) * up)

    def _normed(self, module: str, rows: torch.Tensor) -> torch.Tensor:
        decoder = self._decoder
        return rms_norm(rows, (decoder.hidden,), self._weights[module], decoder.config.rms_norm_eps)

    def _product(self, module: str, given: torch.Tensor) -> torch.Tensor:
        product = linear(given.to(self._dtype), self._weights[module]).to(torch.float32)
        return self._adapt(self._names[module], given, product) if self._adapt else product


def attend(decoder: Decoder, projected: torch.Tensor) -> torch.Tensor:
    """Attention within one text: (S, queries, keys and values) to (S, heads x head size)."""
    config, size = decoder.config, decoder.head_size
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    split = [heads * size, shared * size, shared * size]
    parts = torch.split(projected, split, -1)
    query, key, value = (part.view(1, len(part), -1, size).transpose(1, 2) for part in parts)
    rotate: Any = apply_rotary_pos_emb
    query, key = rotate(query, key, *decoder.rotary(len(projected)))
    if value.requires_grad:
        # Kept for the backward pass by itself, not with the queries and keys that lie around it.
        value = value.contiguous()
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


def places_together(width: int) -> int:
    """How many places go through a matrix of `width` outputs together."""
    return max(64, _PART_BYTES // (4 * width))


def groups(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Texts that follow one another, of `most` places together, or one longer text."""
    group: list[int] = []
    for length in lengths:
        if group and sum(group) + length > most:
            yield group
            group = []
        group.append(length)
    if group:
        yield group
