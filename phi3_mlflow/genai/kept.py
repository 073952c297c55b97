"""What a built model keeps keys and values as, and how much they take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phi3_mlflow.runtime.genai_config import GenaiConfig

if TYPE_CHECKING:
    from pathlib import Path


def kv_cache(onnx_dir: Path) -> str:
    """`float32`, `float16` or `int8`: what the graph keeps keys and values as."""
    import onnx

    file = onnx_dir / GenaiConfig.read(onnx_dir).decoder.filename
    graph = onnx.load(file, load_external_data=False).graph
    kinds = {value.type.tensor_type.elem_type for value in graph.input}
    if onnx.TensorProto.INT8 in kinds:
        return "int8"
    return "float16" if onnx.TensorProto.FLOAT16 in kinds else "float32"


def token_bytes(onnx_dir: Path) -> int:
    """What the keys and values of one token take at most: float16 counts as float32."""
    values = GenaiConfig.read(onnx_dir).decoder.token_values
    return values if kv_cache(onnx_dir) == "int8" else 4 * values
