"""Gradients of an adapter, layer by layer, with what was kept of the forward pass: layer borders.

A layer is computed again from the states that went into it, with torch keeping track, and what came
back from the layer after it goes through: some texts at a time, and in the MLP some places at a
time. The weights are read a second time; none of them has a gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import rms_norm

from phi3_mlflow.core.progress import no_progress
from phi3_mlflow.layers import head
from phi3_mlflow.layers.decoder import NORM
from phi3_mlflow.layers.forward import last_states
from phi3_mlflow.layers.layer import ATTENTION, GATE_UP, MLP, Layer, groups, places_together
from phi3_mlflow.layers.states import States

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from phi3_mlflow.layers.decoder import Decoder
    from phi3_mlflow.layers.layer import Adapt

_KEPT_BYTES = 1 << 28  # of what attention leaves for its backward pass; one text may be more


def add_gradients(
    decoder: Decoder,
    adapt: Adapt,
    pieces: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    *,
    scale: float,
    folder: Path | None = None,
) -> torch.Tensor:
    """The loss at every place that carries one; adds its gradient to what the adapter is made of.

    Args:
        decoder: the model.
        adapt: applies the adapter; its matrices require gradients.
        pieces: token ids, int64 (S,) each; every piece is a text of its own.
        targets: for each piece the token that comes next at every place, int64 (S,); a negative one
            where there is no loss.
        scale: what the sum of all losses is multiplied with before it is differentiated.
        folder: for states that are too many for memory.

    Returns:
        float32 (places with loss,), not multiplied.
    """
    places, lengths = sum(map(len, pieces)), [len(piece) for piece in pieces]
    borders = States(decoder.layers * places, decoder.hidden, folder=folder)

    def keep(number: int, states: States) -> None:
        for start, stop in states.parts(4096):
            borders.write(number * places + start, states.read(start, stop))

    with no_progress("", None) as meter:
        states = last_states(decoder, pieces, meter, adapt=adapt, border=keep, folder=folder)
    losses = _through_head(decoder, states, torch.cat(list(targets)), scale)
    for number in reversed(range(decoder.layers)):
        # Made in the call, so that it is gone before the next one is read.
        _through_layer(
            Layer(decoder, number, (*ATTENTION, *MLP), adapt=adapt),
            borders,
            number * places,
            states,
            lengths,
        )
    return losses


def _through_head(
    decoder: Decoder, states: States, targets: torch.Tensor, scale: float
) -> torch.Tensor:
    """The losses; states are replaced by the gradient that comes back to them."""
    weight, epsilon = decoder.reader.read_float(NORM), decoder.config.rms_norm_eps
    with_loss = (targets >= 0).nonzero().squeeze(1)
    places = torch.split(with_loss, 4096)
    last = torch.cat([states.rows(some) for some in places] or [torch.empty(0, decoder.hidden)])
    normed = rms_norm(last, (decoder.hidden,), weight, epsilon)
    losses, gradient = head.losses(decoder, normed, targets[with_loss], scale)
    del normed
    last.requires_grad_()
    came = _back_through(rms_norm(last, (decoder.hidden,), weight, epsilon), gradient, last)
    for start, stop in states.parts(4096):
        chosen = (with_loss >= start) & (with_loss < stop)
        rows = torch.zeros(stop - start, decoder.hidden)
        rows[with_loss[chosen] - start] = came[chosen]
        states.write(start, rows)
    return losses


def _through_layer(
    layer: Layer, borders: States, offset: int, gradient: States, lengths: Sequence[int]
) -> None:
    """Replace the gradient of what comes out of a layer by that of what goes in."""
    start = 0
    for group in groups(lengths, layer.places_kept(_KEPT_BYTES)):
        stop = start + sum(group)
        given = borders.read(offset + start, offset + stop).detach().requires_grad_()
        back = gradient.read(start, stop)
        mixed = layer.attention(given, group)
        between = given.detach() + mixed.detach()
        for part in torch.split(torch.arange(len(between)), places_together(layer.width(GATE_UP))):
            some = slice(int(part[0]), int(part[-1]) + 1)
            rows = between[some].requires_grad_()
            back[some] += _back_through(layer.mlp(rows), back[some], rows)
        back += _back_through(mixed, back, given)
        gradient.write(start, back)
        start = stop


def _back_through(
    result: torch.Tensor, gradient: torch.Tensor, given: torch.Tensor
) -> torch.Tensor:
    """What comes back to `given`, from which a result was computed; adapters get theirs besides."""
    torch.autograd.backward([result], [gradient])
    assert given.grad is not None
    return given.grad
