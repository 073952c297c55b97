"""What a checkpoint makes of texts, every layer read once.

The places of all texts lie one after another in one matrix, so nothing is padded, and a text's
states do not depend on what it is computed with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from phi3_mlflow.layers import layer as layers
from phi3_mlflow.layers.layer import ATTENTION, MLP, Adapt, Layer, groups
from phi3_mlflow.layers.states import States

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from phi3_mlflow.core.progress import Meter
    from phi3_mlflow.layers.decoder import Decoder

Border = Callable[[int, States], None]
"""Told the number of a layer, and the states that go into it, before it changes them."""


Begun = tuple[int, States]
"""Layers that have been done, and the states after them."""


def work(decoder: Decoder, places: int, done: int = 0) -> int:
    """Multiplications that `final_states` tells its meter of, in thousands.

    Args:
        decoder: the model.
        places: tokens of all texts.
        done: layers that are not computed any more.
    """
    return (decoder.layers - done) * sum(_thousands(decoder, places))


def final_states(
    decoder: Decoder,
    pieces: Sequence[torch.Tensor],
    meter: Meter,
    *,
    dtype: torch.dtype = torch.float32,
    folder: Path | None = None,
    adapt: Adapt | None = None,
    border: Border | None = None,
    begun: Begun | None = None,
) -> States:
    """The states that the head sees, at every place of some texts.

    Args:
        decoder: the model.
        pieces: token ids, int64 (S,) each; every piece is a text of its own.
        meter: told the work that is done, `work` in all.
        dtype: what matrices are multiplied in, see `arithmetic`.
        folder: for states that are too many for memory.
        adapt: what is added to the products of the projections.
        border: called before each layer that is computed.
        begun: where an earlier run of the same has come to; its states are changed.

    Returns:
        float32 (places of all pieces, hidden), one piece after another.
    """
    states = last_states(
        decoder, pieces, meter, dtype=dtype, folder=folder, adapt=adapt, border=border, begun=begun
    )
    with torch.inference_mode():
        for start, stop in states.parts(4096):
            states.write(start, decoder.norm(states.read(start, stop)))
    return states


def last_states(
    decoder: Decoder,
    pieces: Sequence[torch.Tensor],
    meter: Meter,
    *,
    dtype: torch.dtype = torch.float32,
    folder: Path | None = None,
    adapt: Adapt | None = None,
    border: Border | None = None,
    begun: Begun | None = None,
) -> States:
    """What comes out of the last layer: `final_states` before the norm.

    Args:
        decoder: the model.
        pieces: token ids, int64 (S,) each.
        meter: told the work that is done.
        dtype: what matrices are multiplied in.
        folder: for states that are too many for memory.
        adapt: what is added to the products of the projections.
        border: called before each layer.
        begun: where an earlier run of the same has come to.
    """
    tokens = torch.cat(list(pieces))
    done, states = begun or (0, States(len(tokens), decoder.hidden, folder=folder))
    lengths = [len(piece) for piece in pieces]
    attending, thinking = _thousands(decoder, len(tokens))
    with torch.inference_mode():
        if begun is None:
            decoder.embed(tokens, states)
        for number in range(done, decoder.layers):
            if border is not None:
                border(number, states)
            _attention(
                Layer(decoder, number, ATTENTION, dtype=dtype, adapt=adapt),
                states,
                lengths,
                _Told(meter, attending, states.places),
            )
            _mlp(
                Layer(decoder, number, MLP, dtype=dtype, adapt=adapt),
                states,
                _Told(meter, thinking, states.places),
            )
    return states


def _thousands(decoder: Decoder, places: int) -> tuple[int, int]:
    """Multiplications of a layer's attention and of its MLP, in thousands."""
    attention, mlp = _weights(decoder)
    return attention * places // 1000, mlp * places // 1000


def _weights(decoder: Decoder) -> tuple[int, int]:
    """Weights of a layer's attention and of its MLP."""
    config, hidden = decoder.config, decoder.hidden
    width = decoder.head_size * config.num_attention_heads
    narrow = decoder.head_size * config.num_key_value_heads
    return hidden * (2 * width + 2 * narrow), 3 * hidden * config.intermediate_size


class _Told:
    """Tells a meter of work as it is done, place after place.

    Args:
        meter: that is told.
        work: of all places.
        places: how many there are.
    """

    def __init__(self, meter: Meter, work: int, places: int) -> None:
        self._meter, self._work, self._places = meter, work, places
        self._done = 0

    def until(self, place: int) -> None:
        """All places before this one are done."""
        done = self._work * place // self._places
        self._meter.advance(done - self._done)
        self._done = done


def _attention(layer: Layer, states: States, lengths: Sequence[int], told: _Told) -> None:
    """Add what the attention of a layer gives to the states."""
    start = 0
    for group in groups(lengths, layers.places_together(layer.width(layers.QKV))):
        rows = states.read(start, start + sum(group))
        rows += layer.attention(rows, group)
        states.write(start, rows)
        start += sum(group)
        told.until(start)


def _mlp(layer: Layer, states: States, told: _Told) -> None:
    """Add what the MLP of a layer gives to the states."""
    for start, stop in states.parts(layers.places_together(layer.width(layers.GATE_UP))):
        rows = states.read(start, stop)
        rows += layer.mlp(rows)
        states.write(start, rows)
        told.until(stop)
