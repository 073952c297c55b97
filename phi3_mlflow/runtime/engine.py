"""What is asked of an engine, and where a prompt is cut into pieces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from .fair_lock import FairLock
    from .sampling import Sampler

# A cut at the end of a turn costs a small piece of work of its own; below this many tokens since
# the last cut it would not pay.
LEAST_PIECE = 48


class Session(Protocol):
    """One sequence of tokens in the engine's memory."""

    @property
    def capacity(self) -> int:
        """Tokens it has memory for now."""

    room: int
    """Tokens it can come to hold."""
    shared: bool
    """Whether the sessions of several threads are computed together; else they take turns."""
    reusable: bool
    """Whether `rewind` is exact, so that another request may continue from a part of it."""

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens and compute."""

    def logits(self) -> NDArray[np.float32]:
        """Logits of the token that follows the last one, shape (V,), float32."""

    def follow(self, token: int | None) -> int:
        """The likeliest token after `token`, the one that was chosen last (None: none was yet).

        Says what `extend([token])` and the largest of `logits()` would say, without handing the
        logits out. An answer begun with it goes on with it.
        """

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens."""

    def rest(self, length: int) -> None:
        """Nobody asks for more now; of what was computed the first `length` tokens may be kept."""


class Guided(Session, Protocol):
    """A session whose answer follows a schema."""

    def choose(self, sampler: Sampler) -> int:
        """Choose the next token among those that the schema allows, and append it."""


class Engine(Protocol):
    """A loaded model with its tokenizer."""

    context: int
    """Tokens it can hold, prompt and answer together."""
    ends: frozenset[int]
    """Tokens that end a turn."""
    token_bytes: int
    """Bytes of key-value cache for each token."""
    rope_switch: int
    """Length beyond which positions are encoded differently (LongRoPE), or 0."""
    together: int
    """Sequences that it computes at once; 1: one after the other."""
    lock: FairLock
    """Held by whoever makes the engine compute, but for sessions that are `shared`."""

    def render(self, messages: list[dict[str, str]]) -> list[int]:
        """The tokens of a conversation, by the chat template, ready for the assistant's answer."""

    def encode(self, text: str) -> list[int]:
        """The tokens of a literal text, in which control tokens are taken for what they are."""

    def decoder(self) -> Callable[[int], str]:
        """A function that takes the tokens of one answer in turn and gives their text."""

    def spell(self, token: int) -> bytes:
        """The bytes of a token's text; none for a control token."""

    def open(self, capacity: int) -> Session:
        """An empty session that can hold `capacity` tokens."""

    def knows(self, schema: str) -> bool:
        """Whether `try_schema` answers at once."""

    def try_schema(self, schema: str) -> None:
        """See, without holding anybody up, whether answers can be held to a JSON schema.

        Raises:
            RequestError: they cannot.
        """

    def open_guided(self, capacity: int, schema: str) -> Guided:
        """An empty session whose answer follows a JSON schema that was tried; not `reusable`.

        Raises:
            RequestError: this engine cannot, or not this schema.
        """


@dataclass(frozen=True)
class EngineSettings:
    """How an engine is set up: the values of `model_config` that concern it.

    Attributes:
        threads: processor threads; 0 takes every core this process may use.
        max_context: upper bound for prompt and answer together; 0: what the model was made for.
        provider: `cpu` or `cuda`.
        rope_switch: see `Engine.rope_switch`.
        kv_cache: what the graph keeps keys and values as, `float32`, `float16` or `int8`
            (onnxruntime only).
        dtype: number type of the weights (transformers only); empty: as they are stored.
        batch: sequences that are computed together at most (onnxruntime only); 1: none.
    """

    threads: int = 0
    max_context: int = 0
    provider: str = "cpu"
    rope_switch: int = 0
    kv_cache: str = "float32"
    dtype: str = ""
    batch: int = 1


def cuts(tokens: Sequence[int], ends: Collection[int], chunk: int, rope_switch: int) -> list[int]:
    """Where a prompt is cut into the pieces that are computed one after another.

    Kernels round differently for different numbers of rows, so a state may only be reused for
    another prompt if computing that prompt from nothing would take the very same pieces. That
    holds here because each cut depends only on tokens before it: after every turn of the
    conversation (where a later request most often departs) and every `chunk` tokens.

    Returns:
        Ends of the pieces, ascending; the last is `len(tokens)`. A prompt beyond the LongRoPE
        switch is one piece: each of its positions must be computed with the long factors.
    """
    if 0 < rope_switch < len(tokens):
        return [len(tokens)]
    found, last = [], 0
    for at, token in enumerate(tokens, start=1):
        size = at - last
        if size == chunk or (size >= LEAST_PIECE and token in ends):
            found.append(at)
            last = at
    if last < len(tokens):
        found.append(len(tokens))
    return found
