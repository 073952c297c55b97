"""From the last hidden states to logits, some of the vocabulary at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import linear

if TYPE_CHECKING:
    from phi3_mlflow.layers.decoder import Decoder

_CHUNK_BYTES = 1 << 26  # of the head in float32


def logits(
    decoder: Decoder, states: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """What comes next, by `final_states`.

    Args:
        decoder: the model; its head is read anew, a chunk at a time.
        states: float32 (places, hidden).
        dtype: what matrices are multiplied in, see `arithmetic`.

    Returns:
        float32 (places, vocabulary).
    """
    vocabulary, hidden = decoder.reader.shape(decoder.head)
    chunk = max(1, _CHUNK_BYTES // (4 * hidden))
    found = torch.empty((len(states), vocabulary), dtype=torch.float32)
    with torch.inference_mode():
        given = states.to(dtype)
        for start in range(0, vocabulary, chunk):
            weights = decoder.reader.read_float(decoder.head, slice(start, start + chunk))
            found[:, start : start + len(weights)] = linear(given, weights.to(dtype))
    return found
