"""How much memory what is worked on layer by layer may take."""

IN_MEMORY = 1 << 29
"""Bytes that the hidden states of texts may have to be held in memory; more go to a file."""

PASS_TOKENS = 4096
"""Tokens that go through the layers together where gradients are computed, or one longer text."""

CHUNK_BYTES = 1 << 22
"""Of a matrix in float32 whose rows are read some at a time for a few states."""

PASS_PLACES = 512
"""Places that go through the layers together where texts are continued; see `generate`."""

MOST_TEXTS = PASS_PLACES // 2
"""Texts that are continued at once; the other places of a pass are for prompts."""


def generation_memory(hidden: int, widest: int) -> int:
    """Bytes of what a pass of `generate` works on, beside keys and values.

    Args:
        hidden: width of a state.
        widest: outputs of the widest matrix in a layer.
    """
    return 4 * PASS_PLACES * (4 * hidden + 2 * widest) + 3 * CHUNK_BYTES
