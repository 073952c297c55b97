"""From a float checkpoint to one with int4 weights, and what can be chosen about it."""
