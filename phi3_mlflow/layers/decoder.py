"""The parts of a checkpoint that texts go through, read one at a time.

The weights stay in the dtype they are stored in until they are needed, and are computed in float32:
a processor without bfloat16 would emulate it, some hundred times slower. One that multiplies
bfloat16 by itself may be told to, for what does not have to be equal to the last bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import Phi3Config
from transformers.models.phi3.modeling_phi3 import (
    Phi3DecoderLayer,
    Phi3RMSNorm,
    Phi3RotaryEmbedding,
)

from phi3_mlflow.core.machine import multiplies_bfloat16

if TYPE_CHECKING:
    from pathlib import Path

    from phi3_mlflow.checkpoints.reader import CheckpointReader
    from phi3_mlflow.layers.states import States

EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
HEAD = "lm_head.weight"

_TABLE_ROWS = 8192  # of the embedding, read at once


class Decoder:
    """A checkpoint of a Phi-3 model, layer by layer.

    Args:
        checkpoint: its folder, with `config.json`.
        reader: its tensors.
    """

    def __init__(self, checkpoint: Path, reader: CheckpointReader) -> None:
        self.reader = reader
        self.config: Any = Phi3Config.from_pretrained(str(checkpoint))
        self.config._attn_implementation = "sdpa"
        self.layers = int(self.config.num_hidden_layers)
        self.hidden = int(self.config.hidden_size)
        self._rotary = Phi3RotaryEmbedding(self.config)

    @property
    def head_size(self) -> int:
        """Width of a query of one head."""
        heads = self.config.num_attention_heads
        return int(getattr(self.config, "head_dim", None) or self.config.hidden_size // heads)

    @property
    def head(self) -> str:
        """The tensor that the head multiplies with; the embedding's where they are tied."""
        return EMBEDDING if self.config.tie_word_embeddings else HEAD

    @property
    def vocabulary(self) -> int:
        """Rows of the head."""
        return self.reader.shape(self.head)[0]

    def layer(self, number: int) -> Any:
        """A decoder layer of transformers with the checkpoint's weights, in float32."""
        with torch.device("meta"):
            module = Phi3DecoderLayer(self.config, number)
        prefix = f"model.layers.{number}."
        tensors = {name: self.reader.read_float(prefix + name) for name in module.state_dict()}
        module.load_state_dict(tensors, assign=True)
        return module.eval()

    def rotary(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of the first `length` positions, float32 (1, length, rotated).

        LongRoPE has other factors for a text of more than `original_max_position_embeddings`.
        """
        positions = torch.arange(length).unsqueeze(0)
        cosines, sines = self._rotary(torch.empty(0), positions)
        return cosines, sines

    @property
    def rope_switch(self) -> int:
        """The length beyond which LongRoPE has its long factors; 0 for models without it."""
        rope = self.config.rope_parameters
        if rope["rope_type"] != "longrope":
            return 0
        return int(rope["original_max_position_embeddings"])

    def rotary_at(
        self, positions: torch.Tensor, *, beyond: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of positions, int64 (places,), float32 (places, rotated).

        Args:
            positions: of places in texts of whatever lengths.
            beyond: whether these texts are longer than `rope_switch`.
        """
        # The largest position decides, so one is added that is as the texts are.
        decisive = torch.tensor([self.rope_switch if beyond else 0])
        cosines, sines = self._rotary(torch.empty(0), torch.cat([positions, decisive])[None])
        return cosines[0, :-1], sines[0, :-1]

    @property
    def window(self) -> int | None:
        """How many places a place looks at, itself among them; None: all before it."""
        window = getattr(self.config, "sliding_window", None)
        return None if window is None else int(window)

    def mask(self, length: int) -> torch.Tensor | None:
        """Which places each place of a text looks at, bool (1, 1, length, length).

        None where that is all before it and itself: no window, or one that is longer.
        """
        if self.window is None or length <= self.window:
            return None
        return self.seen(torch.arange(length), torch.arange(length))[None, None]

    def seen(self, places: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Which other places (B,) of a text its places (A,) look at, bool (A, B)."""
        back = places[:, None] - others[None, :]
        seen: torch.Tensor = back >= 0
        return seen if self.window is None else seen & (back < self.window)

    def embed(self, tokens: torch.Tensor, states: States, part: int = 4096) -> None:
        """Fill states with the embeddings of token ids (places,); only rows that occur are kept."""
        wanted, which = torch.unique(tokens, return_inverse=True)
        found = []
        for start in range(0, self.reader.shape(EMBEDDING)[0], _TABLE_ROWS):
            rows = wanted[(wanted >= start) & (wanted < start + _TABLE_ROWS)]
            if len(rows):
                table = self.reader.read(EMBEDDING, slice(start, start + _TABLE_ROWS))
                found.append(table[rows - start])
        table = torch.cat(found)
        for start, stop in states.parts(part):
            states.write(start, table[which[start:stop]].to(torch.float32))

    def embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        """The embeddings of a few token ids (places,), float32 (places, hidden)."""
        wanted, which = torch.unique(tokens, return_inverse=True)
        table = [self.reader.read(EMBEDDING, slice(row, row + 1)) for row in wanted.tolist()]
        return torch.cat(table).to(torch.float32)[which]

    def norm(self, states: torch.Tensor) -> torch.Tensor:
        """What the head sees of hidden states (..., hidden)."""
        norm = Phi3RMSNorm(self.hidden, self.config.rms_norm_eps)
        norm.weight.data = self.reader.read_float(NORM)
        normed: torch.Tensor = norm(states)
        return normed


def arithmetic(reader: CheckpointReader) -> torch.dtype:
    """In what matrices are multiplied where speed counts for more than the last bit.

    bfloat16 where the weights are stored in it and the processor multiplies it by itself; else
    float32. Sums, norms, softmax and what is carried from layer to layer are float32 anyway.
    """
    stored = {reader.entry(name).dtype for name in reader if name.endswith("_proj.weight")}
    native = stored == {"BF16"} and multiplies_bfloat16()
    return torch.bfloat16 if native else torch.float32
