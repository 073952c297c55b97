"""Texts continued greedily, many at once, with a few megabytes of the checkpoint in memory.

A pass goes through all layers and reads every matrix once. It takes each text further: one whose
prompt is known by a token, one that was just taken up by as much of its prompt as there is room
for. The places of all texts lie one after another in one matrix, so nothing is padded; each text
has keys and values of its own, in float32. A text that has ended makes room for the next one at
once, so that few passes are made for few texts.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb, repeat_kv

from phi3_mlflow.core.errors import CheckpointRefused
from phi3_mlflow.layers.layer import (
    ATTENTION,
    BEFORE_ATTENTION,
    BEFORE_MLP,
    MLP,
    OUTPUT,
    QKV,
    Layer,
)
from phi3_mlflow.layers.product import likeliest, multiply
from phi3_mlflow.layers.room import MOST_TEXTS, PASS_PLACES

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from phi3_mlflow.layers.decoder import Decoder


@dataclass(frozen=True)
class Prompt:
    """A text to be continued.

    Attributes:
        tokens: its ids, at least one.
        most: tokens that it is continued by at most, at least one.
    """

    tokens: Sequence[int]
    most: int

    @property
    def places(self) -> int:
        """Of keys and values that it takes at most."""
        return len(self.tokens) + self.most


class Text:
    """A prompt that is being continued.

    Attributes:
        number: of the prompt.
        prompt: as it was given.
        made: the tokens that it was continued by; the one that ended it is not among them.
        ended: whether there was one.
    """

    def __init__(self, number: int, prompt: Prompt, decoder: Decoder) -> None:
        self.number, self.prompt = number, prompt
        self.made: list[int] = []
        self.ended = False
        self._known = 0
        self._switch = decoder.rope_switch
        heads = decoder.config.num_key_value_heads
        # What is not written takes no memory.
        self._kept = torch.empty(decoder.layers, 2, heads, prompt.places, decoder.head_size)

    @property
    def length(self) -> int:
        """Tokens so far."""
        return len(self.prompt.tokens) + len(self.made)

    @property
    def beyond(self) -> bool:
        """Whether LongRoPE has its long factors for it."""
        return 0 < self._switch < self.length

    @property
    def unread(self) -> int:
        """Tokens that no pass has taken up."""
        return self.length - self._known

    def take(self, count: int) -> Part:
        """The next so many tokens, for a pass."""
        start, self._known = self._known, self._known + count
        return Part(self, start, self._known)

    def tokens(self, start: int, stop: int) -> list[int]:
        """Token ids from one place to another."""
        read = len(self.prompt.tokens)
        made = self.made[max(0, start - read) : max(0, stop - read)]
        return [*self.prompt.tokens[start:stop], *made]

    def follow(self, token: int, ends: Collection[int]) -> None:
        """Append the token that comes next."""
        self.ended = token in ends
        if self.ended:
            return
        self.made.append(token)
        if self.length == self._switch + 1:
            self._known = 0  # the factors change, for all that was before, too

    @property
    def done(self) -> bool:
        """Whether nothing follows any more."""
        return self.ended or len(self.made) == self.prompt.most

    def let_go(self) -> None:
        """Give keys and values back: others have been promised the room."""
        self._kept = torch.empty(0)

    def keep(
        self, layer: int, start: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add keys and values (places, heads, size) of a layer; gives all so far, heads first."""
        stop = start + len(keys)
        kept = self._kept[layer]
        kept[0, :, start:stop] = keys.transpose(0, 1)
        kept[1, :, start:stop] = values.transpose(0, 1)
        return kept[0, :, :stop], kept[1, :, :stop]


@dataclass(frozen=True)
class Part:
    """Places of a text that a pass takes up, from `start` to `stop`."""

    text: Text
    start: int
    stop: int

    @property
    def count(self) -> int:
        """How many."""
        return self.stop - self.start


class Generation:
    """Prompts that are continued.

    Args:
        decoder: the model.
        prompts: in the order in which they are taken up.
        ends: token ids that end a text.
        room: bytes that the keys and values of all texts may take; one text may take more.

    Attributes:
        running: texts that have been taken up.
        waiting: prompts that have not been, with their numbers.
    """

    def __init__(
        self, decoder: Decoder, prompts: Sequence[Prompt], ends: Collection[int], room: int
    ) -> None:
        self.running: list[Text] = []
        self.waiting = deque(enumerate(prompts))
        self._decoder, self._ends = decoder, ends
        self._most_places = room // token_bytes(decoder)

    def take_up(self) -> Sequence[Part]:
        """What the next pass does; nothing when all texts have ended."""
        taken = sum(text.prompt.places for text in self.running)
        while self.waiting and len(self.running) < MOST_TEXTS:
            number, prompt = self.waiting[0]
            taken += prompt.places
            if self.running and taken > self._most_places:
                break
            self.waiting.popleft()
            self.running.append(Text(number, prompt, self._decoder))
        continued = [text.take(1) for text in self.running if text.unread == 1]
        left, parts = PASS_PLACES - len(continued), continued
        for text in self.running:
            count = min(text.unread, left)
            if count:
                parts.append(text.take(count))
                left -= count
        return parts

    @torch.inference_mode()
    def run(self, parts: Sequence[Part], told: Callable[[float], None]) -> list[Text]:
        """Carry out a pass; gives the texts that have ended with it.

        Args:
            parts: as `take_up` gave them.
            told: which share of the pass is done.

        Raises:
            CheckpointRefused: the weights make infinities or NaN.
        """
        decoder = self._decoder
        ids = [token for part in parts for token in part.text.tokens(part.start, part.stop)]
        states = decoder.embedded(torch.tensor(ids))
        turning = _turning(decoder, parts)
        for number in range(decoder.layers):
            layer = _Passing(decoder, number, (*ATTENTION, *MLP))
            states += layer.continued(states, parts, turning)
            states += layer.mlp(states)
            told((number + 1) / (decoder.layers + 1))
        last = torch.tensor([part.count for part in parts]).cumsum(0) - 1
        whole = [index for index, part in enumerate(parts) if not part.text.unread]
        if whole:
            seen = decoder.norm(states[last[whole]])
            tokens = likeliest(decoder.reader, decoder.head, seen).tolist()
            self._follow([parts[index].text for index in whole], tokens)
        told(1.0)
        ended = [text for text in self.running if text.done]
        for text in ended:
            text.let_go()
        self.running = [text for text in self.running if not text.done]
        return ended

    def _follow(self, texts: Sequence[Text], tokens: Sequence[int]) -> None:
        if min(tokens) < 0:
            raise CheckpointRefused(
                f"{self._decoder.reader.directory}: the weights make infinities or NaN of a text"
            )
        for text, token in zip(texts, tokens, strict=True):
            text.follow(token, self._ends)


def token_bytes(decoder: Decoder) -> int:
    """Bytes of the keys and values of one token."""
    return 8 * decoder.layers * int(decoder.config.num_key_value_heads) * decoder.head_size


def pass_seconds(decoder: Decoder, places: int) -> float:
    """What a pass of so many places takes, by trying its products with one layer."""
    layer = _Passing(decoder, 0, (*ATTENTION, *MLP))
    start = time.perf_counter()
    layer.products(places)
    return (time.perf_counter() - start) * layer.share


class _Passing(Layer):
    """A layer whose matrices are read when they are multiplied with, some rows at a time."""

    def _read(self, module: str) -> torch.Tensor:
        if module in (BEFORE_ATTENTION, BEFORE_MLP):
            return super()._read(module)
        return torch.empty(0)

    def _product(self, module: str, given: torch.Tensor) -> torch.Tensor:
        return multiply(self._decoder.reader, self._names[module], given)

    def continued(
        self,
        rows: torch.Tensor,
        parts: Sequence[Part],
        turning: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """What attention adds to the states of parts of texts, (places, hidden)."""
        projected = self._product(QKV, self._normed(BEFORE_ATTENTION, rows))
        config, size = self._decoder.config, self._decoder.head_size
        heads, shared = config.num_attention_heads, config.num_key_value_heads
        split = torch.split(projected, [heads * size, shared * size, shared * size], -1)
        query, key, value = (one.view(1, len(rows), -1, size) for one in split)
        rotate: Any = apply_rotary_pos_emb
        cosines, sines = turning
        query, key = rotate(query, key, cosines[None], sines[None], unsqueeze_dim=2)
        mixed, at = [], 0
        for part in parts:
            some = slice(at, at + part.count)
            kept = part.text.keep(self._number, part.start, key[0, some], value[0, some])
            mixed.append(_attend(self._decoder, query[0, some], *kept, part.start))
            at += part.count
        return self._product(OUTPUT, torch.cat(mixed))

    @property
    def share(self) -> float:
        """How many times its matrices a whole pass multiplies with."""
        reader = self._decoder.reader

        def weights(name: str) -> int:
            rows, columns = reader.shape(name)
            return rows * columns

        own = sum(weights(name) for module, name in self._names.items() if "norm" not in module)
        return self._decoder.layers + weights(self._decoder.head) / own

    @torch.inference_mode()
    def products(self, places: int) -> None:
        """Multiply with each matrix once."""
        for module, name in self._names.items():
            if "norm" not in module:
                self._product(module, torch.ones(places, self._decoder.reader.shape(name)[1]))


def _turning(decoder: Decoder, parts: Sequence[Part]) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines for every place of a pass, float32 (places, rotated)."""
    positions = torch.cat([torch.arange(part.start, part.stop) for part in parts])
    beyond = torch.tensor([part.text.beyond for part in parts for _ in range(part.count)])
    cosines, sines = decoder.rotary_at(positions.where(~beyond, 0), beyond=False)
    if bool(beyond.any()):
        cosines[beyond], sines[beyond] = decoder.rotary_at(positions[beyond], beyond=True)
    return cosines, sines


def _attend(
    decoder: Decoder, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int
) -> torch.Tensor:
    """Attention of the last places of a text to all before them.

    Args:
        decoder: the model.
        query: (places, heads, size).
        keys: of all places, (shared heads, all places, size).
        values: likewise.
        start: which place the first query is.

    Returns:
        (places, heads x size).
    """
    places, heads, size = query.shape
    shared, length = len(keys), keys.shape[1]
    first = 0 if decoder.window is None else max(0, start + 1 - decoder.window)
    keys, values = keys[None, :, first:], values[None, :, first:]
    if places == 1:
        # The heads that share keys go as if they were places: nothing has to be repeated.
        together = query.view(1, shared, heads // shared, size)
        mixed = scaled_dot_product_attention(together, keys, values, scale=size**-0.5)
        return mixed.reshape(1, heads * size)
    plain = start == 0 and (decoder.window is None or length <= decoder.window)
    mask = None
    if not plain:
        mask = decoder.seen(torch.arange(start, length), torch.arange(first, length))
    mixed = scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        repeat_kv(keys, heads // shared),
        repeat_kv(values, heads // shared),
        attn_mask=mask,
        is_causal=plain,
        scale=size**-0.5,
    )
    return mixed[0].transpose(0, 1).flatten(1)
