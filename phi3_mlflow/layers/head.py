"""From the last hidden states to logits and losses, some of the vocabulary at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import linear

if TYPE_CHECKING:
    from collections.abc import Iterator

    from phi3_mlflow.layers.decoder import Decoder

_CHUNK_BYTES = 1 << 26  # of the head in float32
_LOGIT_BYTES = 1 << 26  # of some of the logits of some places


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
    found = torch.empty((len(states), decoder.vocabulary), dtype=torch.float32)
    with torch.inference_mode():
        given = states.to(dtype)
        for start, weights in _chunks(decoder):
            found[:, start : start + len(weights)] = linear(given, weights.to(dtype))
    return found


def losses(
    decoder: Decoder, states: torch.Tensor, targets: torch.Tensor, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """How unlikely the tokens are that come next, and what states would make them likelier.

    All logits are never there at once; the gradient costs computing them a second time.

    Args:
        decoder: the model; its head is read anew, a chunk at a time.
        states: what the head sees, float32 (places, hidden).
        targets: token ids, int64 (places,).
        scale: what the sum of the losses is multiplied with before it is differentiated; None
            computes no gradient.

    Returns:
        Nats, float32 (places,); and the gradient, float32 (places, hidden), or an empty tensor.
    """
    total = torch.full((len(states),), -torch.inf)
    right = torch.zeros(len(states))
    gradient = torch.zeros_like(states) if scale is not None else torch.empty(0)
    with torch.no_grad():
        for start, weights in _chunks(decoder):
            for some in _places(len(states), len(weights)):
                found = linear(states[some], weights)
                total[some] = torch.logaddexp(total[some], found.logsumexp(-1))
                here, column = _inside(targets[some], start, len(weights))
                right[some][here] = found[here, column]
        if scale is not None:
            for start, weights in _chunks(decoder):
                for some in _places(len(states), len(weights)):
                    found = linear(states[some], weights)
                    found.sub_(total[some, None]).exp_()
                    here, column = _inside(targets[some], start, len(weights))
                    found[here, column] -= 1
                    gradient[some].addmm_(found, weights, alpha=scale)
    return total - right, gradient


def _chunks(decoder: Decoder) -> Iterator[tuple[int, torch.Tensor]]:
    """Rows of the head, float32, each chunk with the number of its first token."""
    vocabulary, hidden = decoder.reader.shape(decoder.head)
    chunk = max(1, _CHUNK_BYTES // (4 * hidden))
    for start in range(0, vocabulary, chunk):
        yield start, decoder.reader.read_float(decoder.head, slice(start, start + chunk))


def _places(count: int, width: int) -> Iterator[slice]:
    size = max(1, _LOGIT_BYTES // (4 * width))
    return (slice(start, start + size) for start in range(0, count, size))


def _inside(targets: torch.Tensor, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The places whose target is among some tokens, and which of these it is."""
    here = ((targets >= start) & (targets < start + count)).nonzero().squeeze(1)
    return here, targets[here] - start
