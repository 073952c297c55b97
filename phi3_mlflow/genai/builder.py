"""onnxruntime-genai's own graph builder, with weights that stay on the disk.

The stock builder loads a whole model, then rounds the whole float graph (`to_nbits`); a 3.8 B model
needs more than 24 GB that way. Here it builds the same graph from `LazyWeights`: the quantized
matrices go into it as MatMulNBits nodes at once, and every initializer reads its tensor while the
file is written. What is overridden is the least that this takes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
from onnxruntime_genai.models.builders.phi import Phi3MiniLongRoPEModel, Phi3MiniModel

from phi3_mlflow.checkpoints.rope import Rope, read_rope
from phi3_mlflow.core.errors import CheckpointRefused, problem_list
from phi3_mlflow.genai.embedding import quantized_embedding
from phi3_mlflow.genai.lazy import LazyArray, LazyWeights
from phi3_mlflow.quantization.plan import EMBEDDING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from phi3_mlflow.checkpoints.reader import CheckpointReader
    from phi3_mlflow.core.progress import Progress
    from phi3_mlflow.quantization.stored import StoredQuantization

# What the builder looks for in any config, and transformers' Phi-3 does not know: a stray key of
# such a name would change the graph and not the model.
_UNKNOWN_TO_PHI3 = (
    "attn_logit_softcapping",
    "ffn_hidden_size",
    "final_logit_softcapping",
    "hidden_activation",
    "moe_intermediate_size",
    "multi_query_group_num",
    "peft_type",
    "rope_embedding_base",
    "rope_position_scale",
    "seq_length",
    "swiglu_limit",
)
_TYPES = {
    "float32": ir.DataType.FLOAT,
    "uint8": ir.DataType.UINT8,
    "int32": ir.DataType.INT32,
}


class _Streaming:
    """Mixed into a builder class before it, so that these methods win."""

    # Set by `streaming_builder`.
    reader: CheckpointReader
    checkpoint_config: Mapping[str, Any]
    stored: StoredQuantization | None
    progress: Progress

    def load_weights(self: Any, input_path: str) -> LazyWeights:
        """Lay out the weights without reading them."""
        del input_path
        return LazyWeights(self.reader, self.checkpoint_config, self.stored, self.q_size)

    def make_initializer(self: Any, tensor: Any, /, name: str, **kwargs: Any) -> None:
        """Register a lazy array as an initializer that is read when it is written."""
        if not isinstance(tensor, LazyArray):
            stock: Any = super()
            stock.make_initializer(tensor, name, **kwargs)
            return
        kind = _TYPES[tensor.kind]
        wanted = kwargs.get("to") or kind
        if wanted != kind and (kind, wanted) != (ir.DataType.FLOAT, ir.DataType.FLOAT16):
            raise TypeError(f"{name} is {kind} and the graph wants {wanted}")
        lazy = ir.LazyTensor(
            lambda: ir.tensor(tensor.numpy().astype(wanted.numpy(), copy=False), name=name),
            dtype=wanted,
            shape=ir.Shape(tensor.shape),
            name=name,
        )
        value = self.make_value(name, lazy.dtype, lazy.shape)
        value.const_value = lazy
        self.model.graph.register_initializer(value)

    def make_packed_matmul(
        self: Any, q: Any, k: Any, v: Any, basename: str, root_input: str, **kwargs: Any
    ) -> str:
        """Phi-3 stores q, k and v as one matrix: use it as it is."""
        del k, v
        output: str = self.make_matmul(q, basename, root_input, **kwargs)
        return output

    def make_embedding_lookup(self: Any, embedding: Any, basename: str, lm_head: Any) -> str:
        """A quantized embedding of its own, where the config asks for one."""
        stored: StoredQuantization | None = self.stored
        if stored is None or not stored.embedding_bits or stored.shared_embedding:
            stock: Any = super()
            return str(stock.make_embedding_lookup(embedding, basename, lm_head))
        bits, block_size = stored.embedding_bits, stored.group_size
        parts = quantized_embedding(self.reader, EMBEDDING, bits, block_size)
        inputs = []
        for part, array in parts.items():
            name = f"model.embed_tokens.{part}"
            self.make_initializer(array, name, to=self.io_dtype if part == "scales" else None)
            inputs.append(name)
        gather = f"{basename}/GatherBlockQuantized"
        self.make_node(
            "GatherBlockQuantized",
            inputs=[inputs[0], self.input_names["input_ids"], *inputs[1:]],
            outputs=[f"{gather}/output_0"],
            name=gather,
            domain="com.microsoft",
            bits=bits,
            block_size=block_size,
            gather_axis=0,
            quantize_axis=1,
        )
        return f"{gather}/output_0"

    def save_model(self: Any, out_dir: str) -> None:
        """Write `model.onnx` and `model.onnx.data`, one tensor after another."""
        from onnxruntime_genai import __version__

        model = self.model
        model.graph.sort()
        # The stock builder appends the commit of whatever git checkout surrounds the installed
        # package, which makes equal models differ.
        model.producer_version = __version__
        out = Path(out_dir) / self.filename
        total = sum(value.const_value.nbytes for value in model.graph.initializers.values())
        with self.progress("writing the ONNX model", total) as meter:
            ir.save(
                model,
                out,
                external_data=f"{out.name}.data",
                size_threshold_bytes=0,
                callback=lambda tensor, _: meter.advance(tensor.nbytes),
            )


class _StreamingPhi3(_Streaming, Phi3MiniModel):  # type: ignore[misc, unused-ignore]
    """One table of rotary embeddings."""


class _StreamingPhi3LongRoPE(_Streaming, Phi3MiniLongRoPEModel):  # type: ignore[misc, unused-ignore]
    """A table for short texts, and one for long ones."""


def streaming_builder(
    config: Any,
    checkpoint_config: Mapping[str, Any],
    stored: StoredQuantization | None,
    reader: CheckpointReader,
    *,
    precision: str,
    provider: str,
    options: Mapping[str, Any],
    progress: Progress,
) -> Any:
    """The builder for a checkpoint.

    Args:
        config: transformers' config object of it.
        checkpoint_config: its `config.json`.
        stored: how its matrices are quantized; None for a float checkpoint.
        reader: its tensors.
        precision: `int4` or `fp32`.
        provider: the execution provider, `cpu` or `cuda`.
        options: the builder's extra options.
        progress: told the bytes written.

    Returns:
        A builder with `make_model`, `save_model`, `make_genai_config` and `save_processing`.
    """
    rope = _give_rope(config, checkpoint_config)
    for name in _UNKNOWN_TO_PHI3:
        if hasattr(config, name):
            delattr(config, name)
    kind = _StreamingPhi3LongRoPE if rope.long else _StreamingPhi3
    onnx_type = ir.DataType.INT4 if precision == "int4" else ir.DataType.FLOAT
    io_type = ir.DataType.FLOAT16 if provider == "cuda" else ir.DataType.FLOAT
    builder = kind(config, io_type, onnx_type, provider, "", dict(options))
    builder.reader = reader
    builder.checkpoint_config = checkpoint_config
    builder.stored = stored
    builder.progress = progress
    builder.tied_quantized_embeddings = stored is not None and stored.shared_embedding
    builder.tied_unquantized_embeddings = precision == "fp32" and bool(
        checkpoint_config.get("tie_word_embeddings")
    )
    return builder


def rope_of(checkpoint_config: Mapping[str, Any]) -> Rope:
    """The rotary settings of a checkpoint's `config.json`.

    Raises:
        CheckpointRefused: they cannot be used.
    """
    rope, problems = read_rope(checkpoint_config)
    if rope is None:
        raise CheckpointRefused(problem_list("the rotary settings cannot be used", problems))
    return rope


def _give_rope(config: Any, checkpoint_config: Mapping[str, Any]) -> Rope:
    """Put the rotary settings into a config object so that the builder computes what they mean.

    Raises:
        CheckpointRefused: they cannot be used.
    """
    rope = rope_of(checkpoint_config)
    config.original_max_position_embeddings = rope.original
    if rope.long:
        # The builder asks for `type`, takes the ratio of the lengths whatever `factor` says, and
        # knows a stated attention factor by another name.
        config.rope_parameters = {**config.rope_parameters, "type": "longrope"}
        for name in ("short_mscale", "long_mscale"):
            config.rope_parameters.pop(name, None)
            if rope.stated:
                config.rope_parameters[name] = rope.attention_factor
    return rope
