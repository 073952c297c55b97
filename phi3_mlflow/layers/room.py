"""How much memory what is worked on layer by layer may take."""

IN_MEMORY = 1 << 29
"""Bytes that the hidden states of texts may have to be held in memory; more go to a file."""
