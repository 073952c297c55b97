"""Weights that are read from the checkpoint only when the ONNX file is being written.

The builder of onnxruntime-genai walks over objects that look like torch modules. These look like
them, know every shape and dtype, and hold no data: each initializer is a function that reads one
tensor, brings it into the layout the graph wants, and forgets it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phi3_mlflow.core.errors import CheckpointRefused
from phi3_mlflow.quantization import packing
from phi3_mlflow.quantization.plan import EMBEDDING

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt
    import torch

    from phi3_mlflow.checkpoints.reader import CheckpointReader
    from phi3_mlflow.quantization.stored import StoredQuantization

Loader = Callable[[], "torch.Tensor"]


@dataclass(frozen=True)
class LazyArray:
    """An array that is made when it is asked for.

    Attributes:
        shape: its shape.
        kind: `float32`, `uint8` or `int32`.
        load: makes it.
    """

    shape: tuple[int, ...]
    kind: str
    load: Loader

    @property
    def T(self) -> LazyArray:
        """The transposed matrix."""
        return LazyArray(self.shape[::-1], self.kind, lambda: self.load().T)

    def numpy(self) -> npt.NDArray[Any]:
        """The array, in C order."""
        return self.load().contiguous().numpy()


class FloatLinear:
    """A float matrix (N, K), or some of its rows."""

    def __init__(self, reader: CheckpointReader, tensor: str, start: int, stop: int) -> None:
        """Rows `start` to `stop` of a tensor."""
        self.bias = None
        self.out_features = stop - start
        columns = reader.shape(tensor)[1]
        self.in_features = columns
        self.weight = LazyArray(
            (stop - start, columns),
            "float32",
            lambda: reader.read_float(tensor, slice(start, stop)),
        )


class QuantizedLinear:
    """A matrix in GPTQ's format, or some of its rows, offered in MatMulNBits' layout.

    Attributes:
        qweight, scales: as MatMulNBits takes them.
        qzeros: zero points, None when all are the middle step, which is what MatMulNBits assumes.
    """

    g_idx = None

    def __init__(
        self,
        reader: CheckpointReader,
        module: str,
        bits: int,
        block_size: int,
        rows: slice | None = None,
    ) -> None:
        """Rows `rows` (None: all) of a module such as `model.layers.0.mlp.down_proj`."""
        words, total = reader.shape(f"{module}.qweight")
        start, stop, _ = (rows or slice(None)).indices(total)
        self.bias = None
        self.bits, self.group_size = bits, block_size
        self.in_features, self.out_features = words * 32 // bits, stop - start
        blocks = self.in_features // block_size
        _check_sizes(reader, module, self.in_features, total, bits, block_size)

        def zero_points() -> torch.Tensor:
            zeros = packing.unpack_gptq_zeros(reader.read(f"{module}.qzeros"), bits)
            return zeros[start:stop]

        self.qweight = LazyArray(
            (stop - start, blocks, block_size * bits // 8),
            "uint8",
            lambda: packing.gptq_weight_to_ort(
                reader.read(f"{module}.qweight")[:, start:stop], bits, block_size
            ),
        )
        self.scales = LazyArray(
            (stop - start, blocks),
            "float32",
            lambda: reader.read_float(f"{module}.scales")[:, start:stop].T,
        )
        self.qzeros: LazyArray | None = None
        if not bool((zero_points() == 2 ** (bits - 1)).all()):
            row_bytes = (blocks * bits + 7) // 8
            self.qzeros = LazyArray(
                (stop - start, row_bytes),
                "uint8",
                lambda: packing.pack_ort_zeros(zero_points(), bits),
            )


class Norm:
    """The weight of an RMS norm: small, so it is read at once."""

    bias = None

    def __init__(self, reader: CheckpointReader, name: str) -> None:
        """The tensor `name`, float32."""
        self.weight = reader.read_float(name)


class Embedding:
    """The embedding's float matrix (vocabulary, hidden)."""

    def __init__(self, reader: CheckpointReader, name: str) -> None:
        """The tensor `name`."""
        shape = reader.shape(name)
        self.weight = LazyArray(shape, "float32", lambda: reader.read_float(name))


class _Part:
    """A holder of modules."""

    def __init__(self, **modules: Any) -> None:
        self.__dict__.update(modules)


class LazyDecoderLayer:
    """A decoder layer; the builder knows one by the end of its class's name."""

    def __init__(self, input_layernorm: Norm, self_attn: _Part, after: Norm, mlp: _Part) -> None:
        """The parts by the names the builder asks for."""
        self.input_layernorm = input_layernorm
        self.self_attn = self_attn
        self.post_attention_layernorm = after
        self.mlp = mlp


class LazyWeights:
    """A whole model's weights, unread.

    Attributes:
        embedding, final_norm, lm_head: what the builder looks for by these names.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        config: Mapping[str, Any],
        stored: StoredQuantization | None,
        q_rows: int,
    ) -> None:
        """Lay out the modules.

        Args:
            reader: the checkpoint's tensors, float or in GPTQ's format version 1.
            config: its `config.json`.
            stored: how its matrices are quantized; None for a float checkpoint.
            q_rows: rows of qkv_proj that are the queries'.
        """
        self._reader = reader
        self._stored = stored
        self._layers = int(config["num_hidden_layers"])
        self._intermediate = int(config["intermediate_size"])
        self._q_rows = q_rows
        self.embedding = Embedding(reader, EMBEDDING)
        self.final_norm = Norm(reader, "model.norm.weight")
        self.lm_head = self._head(bool(config.get("tie_word_embeddings", False)))

    def modules(self) -> list[Any]:
        """Every part in the order of the computation."""
        layers = [self._layer(i) for i in range(self._layers)]
        return [self.embedding, *layers, self.final_norm, self.lm_head]

    def _layer(self, number: int) -> LazyDecoderLayer:
        prefix = f"model.layers.{number}"
        qkv = self._linear(f"{prefix}.self_attn.qkv_proj")
        gate = self._linear(f"{prefix}.mlp.gate_up_proj", slice(0, self._intermediate))
        up = self._linear(f"{prefix}.mlp.gate_up_proj", slice(self._intermediate, None))
        return LazyDecoderLayer(
            Norm(self._reader, f"{prefix}.input_layernorm.weight"),
            # The builder packs q, k and v into one MatMul; here they are one from the start.
            _Part(
                q_proj=qkv,
                k_proj=qkv,
                v_proj=qkv,
                o_proj=self._linear(f"{prefix}.self_attn.o_proj"),
            ),
            Norm(self._reader, f"{prefix}.post_attention_layernorm.weight"),
            _Part(gate_proj=gate, up_proj=up, down_proj=self._linear(f"{prefix}.mlp.down_proj")),
        )

    def _head(self, tied: bool) -> FloatLinear | QuantizedLinear:
        if self._stored is not None and "lm_head.qweight" in self._reader:
            return self._linear("lm_head")
        name = EMBEDDING if tied else "lm_head.weight"
        return FloatLinear(self._reader, name, 0, self._reader.shape(name)[0])

    def _linear(self, module: str, rows: slice | None = None) -> FloatLinear | QuantizedLinear:
        if self._stored is not None and f"{module}.qweight" in self._reader:
            bits, block_size = self._stored.layout_of(module)
            if block_size == -1:
                block_size = self._reader.shape(f"{module}.g_idx")[0]
            return QuantizedLinear(self._reader, module, bits, block_size, rows)
        name = f"{module}.weight"
        start, stop, _ = (rows or slice(None)).indices(self._reader.shape(name)[0])
        return FloatLinear(self._reader, name, start, stop)


def _check_sizes(
    reader: CheckpointReader, module: str, columns: int, rows: int, bits: int, block_size: int
) -> None:
    expected = {
        "qzeros": (columns // block_size, rows * bits // 32),
        "scales": (columns // block_size, rows),
    }
    for part, shape in expected.items():
        found = reader.shape(f"{module}.{part}")
        if columns % block_size or found != shape:
            raise CheckpointRefused(
                f"{reader.directory}: {module}.{part} has shape {found}; int{bits} in groups of "
                f"{block_size} with qweight for ({rows}, {columns}) needs {shape}"
            )
