"""Key-value memory in int8: a quarter of what float32 takes, for every token of the context.

onnxruntime's GroupQueryAttention keeps keys and values as int8 when it is given the scales: one for
each channel of each head (`k_quant_type` and `v_quant_type` PER_CHANNEL, inputs `k_scale` and
`v_scale` of shape (heads, 1, head size), value = code x scale, codes -127 to 127). The scales are
part of the graph; they are taken from what the model itself keeps while it reads some texts.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from phi3_mlflow.core.errors import ProjectError
from phi3_mlflow.core.progress import Progress, no_progress
from phi3_mlflow.runtime.genai_config import Decoder, GenaiConfig

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

_CODES = 127
_STEPS = 8
"""Scales are powers of two to the 1/8, so that the last bits of a sum on another processor do not
change them."""
_K_SCALE = 12
"""Place of `k_scale` among the inputs of GroupQueryAttention; `v_scale` comes after it."""


def use_int8(
    onnx_dir: Path,
    sequences: Sequence[Sequence[int]],
    rotated: int,
    progress: Progress = no_progress,
) -> None:
    """Change a built directory's graph so that it keeps keys and values as int8.

    Args:
        onnx_dir: what the builder wrote, with memory in float32.
        sequences: token ids of texts to take the scales from.
        rotated: values of a head that are turned by position, the first ones.
        progress: told the sequences that were read.

    Raises:
        ProjectError: the graph has no attention of this kind.
    """
    decoder = GenaiConfig.read(onnx_dir).decoder
    largest = _largest(onnx_dir / decoder.filename, decoder, sequences, rotated, progress)
    model = onnx.load(str(onnx_dir / decoder.filename), load_external_data=False)
    kept = {name for pair in decoder.cache for name in pair}
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.name in kept:
            value.type.tensor_type.elem_type = TensorProto.INT8
    nodes = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
    if len(nodes) != decoder.layers:
        raise ProjectError(
            f"{onnx_dir}: {len(nodes)} nodes GroupQueryAttention for {decoder.layers} layers; "
            "keys and values cannot be kept in int8"
        )
    for node in nodes:
        _, key, value = node.output
        inputs = [*node.input, *[""] * (_K_SCALE - len(node.input))]
        for name, most in (("k_scale", largest[key]), ("v_scale", largest[value])):
            tensor = numpy_helper.from_array(scale(most)[:, None, :], f"{node.name}.{name}")
            model.graph.initializer.append(tensor)
            inputs.append(tensor.name)
        del node.input[:]
        node.input.extend(inputs)
        node.attribute.append(helper.make_attribute("k_quant_type", "PER_CHANNEL"))
        node.attribute.append(helper.make_attribute("v_quant_type", "PER_CHANNEL"))
        node.attribute.append(helper.make_attribute("kv_cache_bit_width", 8))
    onnx.save(model, str(onnx_dir / decoder.filename))


def most_of_keys(keys: NDArray[np.float32], rotated: int) -> NDArray[np.float32]:
    """What the channels of keys can reach at any position, from keys at some.

    Rotary embeddings turn two channels into each other, i and i + rotated / 2, the slower the
    larger i: in a text of some hundred tokens the slow ones have hardly moved, and further on one
    channel takes on what was the other's. What no position changes is the length of the two.

    Args:
        keys: float32 (heads, tokens, head size), turned.
        rotated: values of a head that are turned, the first ones.

    Returns:
        (heads, head size): the largest length of a channel's pair; of what is not turned, the
        largest absolute value.
    """
    half = rotated // 2
    pair = np.hypot(keys[..., :half], keys[..., half:rotated]).max(axis=1)
    rest = np.abs(keys[..., rotated:]).max(axis=1)
    return np.concatenate([pair, pair, rest], axis=1)


def scale(largest: NDArray[np.float32]) -> NDArray[np.float32]:
    """The scale of codes up to 127 that reach values, rounded up to a step of its own.

    Args:
        largest: float32, the largest absolute values; 0 where nothing was ever kept.
    """
    steps = np.ceil(_STEPS * np.log2(np.maximum(largest, 1e-6) / _CODES))
    return np.asarray(2.0 ** (steps / _STEPS), dtype=np.float32)


def _largest(
    graph: Path,
    decoder: Decoder,
    sequences: Sequence[Sequence[int]],
    rotated: int,
    progress: Progress,
) -> dict[str, NDArray[np.float32]]:
    """The largest of every channel of keys and values, (heads, head size) by output."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime as ort

    session = ort.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    empty = np.zeros((1, decoder.heads, 0, decoder.head_size), dtype=np.float32)
    outputs = [present for _, present in decoder.cache]
    found: dict[str, NDArray[np.float32]] = {}
    with progress("scales of keys and values", len(sequences), "texts") as meter:
        for tokens in sequences:
            given: dict[str, Any] = {past: empty for past, _ in decoder.cache}
            given[decoder.input_ids] = np.array([tokens], dtype=np.int64)
            given[decoder.attention_mask] = np.ones((1, len(tokens)), dtype=np.int64)
            kept = session.run(outputs, given)
            for index, (name, states) in enumerate(zip(outputs, kept, strict=True)):
                is_key = index % 2 == 0  # `Decoder.cache` has keys and values in turn
                most = most_of_keys(states[0], rotated) if is_key else np.abs(states[0]).max(axis=1)
                found[name] = np.maximum(found[name], most) if name in found else most
            meter.advance(1)
    if not all(np.isfinite(most).all() for most in found.values()):
        raise ProjectError(f"{graph}: keys or values are not finite numbers")
    return found
