"""Checkpoints in Hugging Face layout: read, written, checked and converted, tensor by tensor."""
