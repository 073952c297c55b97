"""Decide, before any weight is read, what becomes of every tensor of a checkpoint.

The plan follows from the config, the tensors' shapes and the settings alone. It is what the
streaming quantizer works off, what the preflight check sums up, and what the config of the
quantized checkpoint states.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phi3_mlflow.checkpoints.rope import onnx_problems, read_rope, settled_rope
from phi3_mlflow.checkpoints.settle import has_own_head
from phi3_mlflow.checkpoints.writer import Announced
from phi3_mlflow.core.errors import CheckpointRefused, UserError, problem_list
from phi3_mlflow.quantization.settings import (
    BLOCK_SIZES,
    PROJECTIONS,
    MixedPrecisionSettings,
    QuantizationSettings,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from phi3_mlflow.checkpoints.reader import CheckpointReader

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head"
_MODULES = {
    "qkv_proj": "self_attn.qkv_proj",
    "o_proj": "self_attn.o_proj",
    "gate_up_proj": "mlp.gate_up_proj",
    "down_proj": "mlp.down_proj",
}


@dataclass(frozen=True)
class LinearPlan:
    """A matrix that is quantized.

    Attributes:
        name: the module, such as `model.layers.0.mlp.down_proj` or `lm_head`.
        source: the tensor the weights come from; the embedding's for a tied head.
        rows: output features N.
        columns: input features K.
        bits: 4 or 8.
        block_size: weights of a row that share a scale; divides K.
        symmetric: whether every zero point is the middle step.
        layer: number of the decoder layer, None for the head.
    """

    name: str
    source: str
    rows: int
    columns: int
    bits: int
    block_size: int
    symmetric: bool
    layer: int | None

    @property
    def blocks(self) -> int:
        """Blocks per row."""
        return self.columns // self.block_size

    def announced(self) -> dict[str, Announced]:
        """The tensors this becomes, in GPTQ's layout."""
        per_word = 32 // self.bits
        return {
            f"{self.name}.qweight": Announced("I32", (self.columns // per_word, self.rows)),
            f"{self.name}.qzeros": Announced("I32", (self.blocks, self.rows // per_word)),
            f"{self.name}.scales": Announced("F16", (self.blocks, self.rows)),
            f"{self.name}.g_idx": Announced("I32", (self.columns,)),
        }


@dataclass(frozen=True)
class CopyPlan:
    """A tensor that is copied as it is: the norms, and an embedding that stays float."""

    name: str
    tensor: Announced


@dataclass(frozen=True)
class QuantizationPlan:
    """What becomes of a checkpoint; `steps` is in the order of writing.

    Attributes:
        steps: every tensor of the quantized checkpoint.
        tied: the head shares the embedding's weights.
        embedding_bits: bits of a quantized embedding, 0 for a float one.
        shared_embedding: the embedding is read from the quantized head.
        layers: decoder layers.
    """

    steps: tuple[LinearPlan | CopyPlan, ...]
    tied: bool
    embedding_bits: int
    shared_embedding: bool
    layers: int

    def linears(self) -> list[LinearPlan]:
        """The quantized matrices."""
        return [step for step in self.steps if isinstance(step, LinearPlan)]

    def announced(self) -> dict[str, Announced]:
        """Every tensor that will be written, in order."""
        tensors: dict[str, Announced] = {}
        for step in self.steps:
            if isinstance(step, LinearPlan):
                tensors.update(step.announced())
            else:
                tensors[step.name] = step.tensor
        return tensors


def make_plan(
    config: Mapping[str, Any], reader: CheckpointReader, settings: QuantizationSettings
) -> QuantizationPlan:
    """QuantizationPlan the quantization of a Phi-3 checkpoint; reads the headers and no weights.

    Args:
        config: its `config.json`.
        reader: its tensors.
        settings: the choices.

    Raises:
        CheckpointRefused: the config or the tensors are not those of a float `Phi3ForCausalLM`.
        UserError: the settings do not fit this model's sizes.
    """
    check_architecture(config)
    if "quantization_config" in config:
        raise CheckpointRefused(
            f"{reader.directory} is quantized already (quantization_config in config.json): "
            "start from the full-precision checkpoint"
        )
    layers = int(config["num_hidden_layers"])
    tied = shares_head(config, reader)
    embedding_bits, shared = _embedding(settings, tied)
    linears = _linears(reader, settings, layers, tied)
    problems = _misfits(linears, settings, layers)
    if problems:
        raise UserError(problem_list(f"the settings do not fit {reader.directory}", problems))
    steps = _order(reader, linears, tied)
    return QuantizationPlan(tuple(steps), tied, embedding_bits, shared, layers)


def check_architecture(config: Mapping[str, Any]) -> None:
    """Refuse what is not a `Phi3ForCausalLM`.

    Raises:
        CheckpointRefused: another architecture, or a needed key is missing.
    """
    if config.get("architectures") != ["Phi3ForCausalLM"]:
        raise CheckpointRefused(
            f"config.json: architectures is {config.get('architectures')!r}; "
            "this project reads ['Phi3ForCausalLM']"
        )
    needed = (
        "num_hidden_layers",
        "num_attention_heads",
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "vocab_size",
    )
    missing = [key for key in needed if not isinstance(config.get(key), int)]
    if missing:
        raise CheckpointRefused(f"config.json: no whole number at {', '.join(missing)}")
    # A fetched checkpoint is spelled well; one that was named may be as it came.
    rope, problems = read_rope(config)
    if rope is None or settled_rope(config)[0] != config:
        raise CheckpointRefused(
            problem_list(
                "the rotary settings of config.json cannot be used",
                problems or settled_rope(config)[1],
                "The step fetch puts the spelling straight: take the folder as the profile's "
                "source, file:DIRECTORY.",
            )
        )
    if problems := onnx_problems(rope):
        raise CheckpointRefused(problem_list("no ONNX model can be made of it", problems))


def shares_head(config: Mapping[str, Any], reader: CheckpointReader) -> bool:
    """Whether the head is the embedding.

    Raises:
        CheckpointRefused: it is said to be, and a head of its own is stored.
    """
    if has_own_head(config, reader):
        raise CheckpointRefused(
            f"{reader.directory}: tie_word_embeddings is true in config.json, and {HEAD}.weight "
            "differs from the embedding. Set it to false, or take the folder as the profile's "
            "source, file:DIRECTORY: the step fetch does so"
        )
    return bool(config.get("tie_word_embeddings", False))


def _embedding(settings: QuantizationSettings, tied: bool) -> tuple[int, bool]:
    choice = settings.embedding
    if choice == "auto":
        choice = "shared" if tied else "fp32"
    if choice == "shared":
        if not tied:
            raise UserError(
                "embedding: shared needs a model whose head and embedding are tied "
                "(tie_word_embeddings in config.json); allowed here: auto, fp32, int4, int8"
            )
        return settings.head_bits(), True
    return {"fp32": 0, "int4": 4, "int8": 8}[choice], False


def _linears(
    reader: CheckpointReader, settings: QuantizationSettings, layers: int, tied: bool
) -> dict[str, LinearPlan]:
    in_int8, projections = settings.layers_in_int8(layers), settings.projections_in_int8()
    linears = {}
    for layer in range(layers):
        for projection in PROJECTIONS:
            name = f"model.layers.{layer}.{_MODULES[projection]}"
            bits = 8 if projection in projections and layer in in_int8 else 4
            linears[name] = _linear(reader, settings, name, f"{name}.weight", bits, layer)
    source = EMBEDDING if tied else f"{HEAD}.weight"
    linears[HEAD] = _linear(reader, settings, HEAD, source, settings.head_bits(), None)
    return linears


def _linear(
    reader: CheckpointReader,
    settings: QuantizationSettings,
    name: str,
    source: str,
    bits: int,
    layer: int | None,
) -> LinearPlan:
    shape = reader.shape(source)
    if len(shape) != 2:
        raise CheckpointRefused(f"{reader.directory}: {source} has shape {shape}, not (N, K)")
    # int8 steps are so fine that a zero point gains nothing; without one the file is smaller.
    symmetric = settings.is_symmetric() or bits == 8
    block_size = settings.block_size_of(name.rsplit(".", 1)[-1], bits)
    return LinearPlan(name, source, shape[0], shape[1], bits, block_size, symmetric, layer)


def _misfits(
    linears: Mapping[str, LinearPlan], settings: QuantizationSettings, layers: int
) -> list[str]:
    problems: dict[tuple[str, int], str] = {}
    for plan in linears.values():
        if plan.columns % plan.block_size:
            allowed = [size for size in BLOCK_SIZES if plan.columns % size == 0]
            kind = plan.name.rsplit(".", 1)[-1]
            problems[kind, plan.columns] = (
                f"block_size {plan.block_size} does not divide the {plan.columns} columns of "
                f"{kind}; allowed: {', '.join(map(str, allowed)) or 'none'}"
            )
        if plan.rows % 8:
            problems["rows", plan.rows] = (
                f"{plan.name} has {plan.rows} rows; the GPTQ format packs rows by eights"
            )
    if isinstance(settings, MixedPrecisionSettings) and isinstance(settings.mixed_layers, tuple):
        beyond = [layer for layer in settings.mixed_layers if layer >= layers]
        if beyond:
            problems["mixed_layers", 0] = (
                f"mixed_layers names {beyond}; the model has the layers 0 to {layers - 1}"
            )
    return list(problems.values())


def _order(
    reader: CheckpointReader, linears: Mapping[str, LinearPlan], tied: bool
) -> list[LinearPlan | CopyPlan]:
    """Embedding, layers in their order, final norm, head: the order of the computation."""
    sources = {plan.source: plan for plan in linears.values() if plan.source != EMBEDDING}
    steps: list[LinearPlan | CopyPlan] = []
    for name in sorted(reader, key=_position):
        if name in sources:
            steps.append(sources[name])
        elif name.endswith(".bias"):
            raise CheckpointRefused(f"{reader.directory}: {name}: Phi-3 has no biases")
        elif not (tied and name == f"{HEAD}.weight"):
            entry = reader.entry(name)
            steps.append(CopyPlan(name, Announced(entry.dtype, entry.shape)))
    if tied:
        steps.append(linears[HEAD])
    return steps


_WITHIN_LAYER = ("input_layernorm", "qkv_proj", "o_proj", "post_attention_layernorm",
                 "gate_up_proj", "down_proj")  # fmt: skip


def _position(name: str) -> tuple[int, int, int, str]:
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer:
        within = [i for i, part in enumerate(_WITHIN_LAYER) if part in name]
        return 1, int(layer[1]), within[0] if within else len(_WITHIN_LAYER), name
    return (0 if name == EMBEDDING else 3 if name.startswith(HEAD) else 2), 0, 0, name
