"""Tiny checkpoints for the engines."""

from tests.fixtures.tiny_checkpoints import checkpoint, longrope, onnx_dir, twice_bos, windowed

__all__ = ["checkpoint", "longrope", "onnx_dir", "twice_bos", "windowed"]
