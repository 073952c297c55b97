"""A decoder layer and the calibration texts' states that go through it, a few texts at a time.

Between the matrices the inputs are computed anew where that costs little, and kept where it costs a
product of matrices: in memory as long as there is room, else in a file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from phi3_mlflow.layers.room import IN_MEMORY
from phi3_mlflow.layers.states import States
from phi3_mlflow.quantization.effort import BATCH

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from phi3_mlflow.layers.decoder import Decoder


class Passage:
    """The states of texts of one length on their way through a layer.

    The methods are called in the order of the computation: `attention_inputs`, `attend`, `kept`,
    `leave_attention`, `mlp_inputs`, `activate`, `kept`, `leave_mlp`.

    Args:
        decoder: the checkpoint.
        layer: number of the layer.
        states: float32 (places, hidden), the sequences one after another; they are overwritten.
        length: tokens of a sequence.
        folder: where the file lies that holds what is too much for memory.
    """

    def __init__(
        self, decoder: Decoder, layer: int, states: States, length: int, folder: Path | None
    ) -> None:
        self.module = decoder.layer(layer)
        self._decoder, self._states, self._length, self._folder = decoder, states, length, folder
        self._kept: States | None = None

    def attention_inputs(self) -> Iterator[torch.Tensor]:
        """What qkv_proj sees, in parts (sequences, tokens, hidden)."""
        for _, part in self._parts(self._states):
            yield self.module.input_layernorm(part)

    def attend(self) -> None:
        """Compute and keep what o_proj sees."""
        attention = self.module.self_attn
        output, attention.o_proj = attention.o_proj, torch.nn.Identity()
        rotary, mask = self._decoder.rotary(self._length), self._decoder.mask(self._length)
        start = 0
        for part in self.attention_inputs():
            # Without a mask the attention is causal; the sequences are not padded.
            mixed = attention(part, position_embeddings=rotary, attention_mask=mask)[0]
            start = self._keep(start, mixed)
        attention.o_proj = output
        del attention.qkv_proj

    def leave_attention(self) -> None:
        """Add what o_proj makes of the inputs that were kept."""
        self._add(self.module.self_attn.o_proj)
        del self.module.self_attn

    def mlp_inputs(self) -> Iterator[torch.Tensor]:
        """What gate_up_proj sees, in parts (sequences, tokens, hidden)."""
        for _, part in self._parts(self._states):
            yield self.module.post_attention_layernorm(part)

    def activate(self) -> None:
        """Compute and keep what down_proj sees."""
        mlp, start = self.module.mlp, 0
        for part in self.mlp_inputs():
            gate, up = mlp.gate_up_proj(part).chunk(2, dim=-1)
            start = self._keep(start, mlp.activation_fn(gate).mul_(up))
        del mlp.gate_up_proj

    def leave_mlp(self) -> None:
        """Add what down_proj makes of the inputs that were kept."""
        self._add(self.module.mlp.down_proj)

    def kept(self) -> Iterator[torch.Tensor]:
        """The inputs that were kept, in parts (sequences, tokens, width)."""
        assert self._kept is not None
        for _, part in self._parts(self._kept):
            yield part

    def _parts(self, states: States) -> Iterator[tuple[int, torch.Tensor]]:
        for start, stop in states.parts(BATCH * self._length):
            yield start, states.read(start, stop).view(-1, self._length, states.width)

    def _keep(self, start: int, part: torch.Tensor) -> int:
        if self._kept is None:
            states = self._states
            room = IN_MEMORY - states.places * states.width * 4
            self._kept = States(states.places, part.shape[-1], folder=self._folder, most=room)
        rows = part.reshape(-1, part.shape[-1])
        self._kept.write(start, rows)
        return start + len(rows)

    def _add(self, linear: Any) -> None:
        assert self._kept is not None
        for start, part in self._parts(self._kept):
            rows = self._states.read(start, start + part.shape[0] * self._length)
            rows += linear(part).view(rows.shape)
            self._states.write(start, rows)
        self._kept = None
