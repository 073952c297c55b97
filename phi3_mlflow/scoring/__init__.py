"""Batch scoring: the rows of a file answered by a model, resumable, on this machine or on Spark."""
