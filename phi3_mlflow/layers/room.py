"""How much memory what is worked on layer by layer may take."""

IN_MEMORY = 1 << 29
"""Bytes that the hidden states of texts may have to be held in memory; more go to a file."""

PASS_TOKENS = 4096
"""Tokens that go through the layers together where gradients are computed, or one longer text."""
