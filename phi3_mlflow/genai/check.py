"""Look at what was built: the builder ignores options it does not know, and says nothing."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime_genai as og

from phi3_mlflow.core.errors import ProjectError, problem_list
from phi3_mlflow.core.machine import usable_cores
from phi3_mlflow.genai.export import DATA_FILE, MODEL_FILE
from phi3_mlflow.runtime.genai_folder import provider_here, session_config

if TYPE_CHECKING:
    from pathlib import Path

    from phi3_mlflow.quantization.settings import QuantizationSettings

_PROBE = (1, 3, 2, 5)
_MOST_PROBLEMS = 12


@dataclass(frozen=True)
class CheckReport:
    """What an ONNX directory holds.

    Attributes:
        int4_nodes, int8_nodes: MatMulNBits nodes by bits.
        float_matmuls: MatMul nodes with float weights.
        block_sizes: the block sizes in use.
        accuracy_levels: the accuracy levels in use.
        embedding: `float`, `int4`, `int8`, or the last two with ` (shared)`.
        data_bytes: length of `model.onnx.data`.
        logits: vocabulary size of the logits that a probe gave.
    """

    int4_nodes: int
    int8_nodes: int
    float_matmuls: int
    block_sizes: tuple[int, ...]
    accuracy_levels: tuple[int, ...]
    embedding: str
    data_bytes: int
    logits: int


def check_export(onnx_dir: Path, settings: QuantizationSettings | None) -> CheckReport:
    """Compare a built directory with what was asked for, load it and run a few tokens.

    Args:
        onnx_dir: what `export_onnx` wrote.
        settings: what the weights were quantized with; None for a float model.

    Raises:
        ProjectError: names every difference.
    """
    graph = onnx.load(str(onnx_dir / MODEL_FILE), load_external_data=False).graph
    genai = json.loads((onnx_dir / "genai_config.json").read_text(encoding="utf-8"))
    layers = int(genai["model"]["decoder"]["num_hidden_layers"])
    nodes = [node for node in graph.node if node.op_type == "MatMulNBits"]
    floats = [node for node in graph.node if node.op_type == "MatMul"]
    problems = _data_problems(graph, onnx_dir)
    if settings is None:
        problems += [f"{node.name} is quantized" for node in nodes]
    else:
        problems += _node_problems(graph, nodes, settings, layers)
        problems += [f"{node.name} has float weights" for node in floats]
        wanted = {
            "fp32": "float",
            "int4": "int4",
            "int8": "int8",
            "shared": f"int{settings.head_bits()} (shared)",
        }.get(settings.embedding, _embedding(graph))
        if _embedding(graph) != wanted:
            problems.append(f"the embedding is {_embedding(graph)}, not {wanted}")
    if problems:
        more = len(problems) - _MOST_PROBLEMS
        shown = problems[:_MOST_PROBLEMS] + ([f"and {more} more"] if more > 0 else [])
        raise ProjectError(problem_list(f"{onnx_dir} is not what was asked for", shown))
    attributes = [_attributes(node) for node in nodes]
    bits = Counter(found["bits"] for found in attributes)
    return CheckReport(
        int4_nodes=bits[4],
        int8_nodes=bits[8],
        float_matmuls=len(floats),
        block_sizes=tuple(sorted({found["block_size"] for found in attributes})),
        accuracy_levels=tuple(sorted({found["accuracy_level"] for found in attributes})),
        embedding=_embedding(graph),
        data_bytes=(onnx_dir / DATA_FILE).stat().st_size,
        logits=_probe(onnx_dir),
    )


def _node_problems(
    graph: onnx.GraphProto,
    nodes: list[onnx.NodeProto],
    settings: QuantizationSettings,
    layers: int,
) -> list[str]:
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    expected = expected_nodes(settings, layers)
    problems = []
    for node in nodes:
        found = _attributes(node)
        wanted = expected.pop(node.name, None)
        if wanted is None:
            problems.append(f"{node.name} was not expected")
            continue
        problems += [
            f"{node.name}: {key} is {found.get(key)}, not {value}"
            for key, value in wanted.items()
            if found.get(key) != value
        ]
        size = found["block_size"] * found["bits"] // 8
        shape = (found["N"], found["K"] // found["block_size"], size)
        if shapes.get(node.input[1]) != shape:
            problems.append(f"{node.name}: weights are {shapes.get(node.input[1])}, not {shape}")
    problems += [f"there is no node {name}" for name in expected]
    return problems


def expected_nodes(settings: QuantizationSettings, layers: int) -> dict[str, dict[str, int]]:
    """Name and attributes of every MatMulNBits node of a model of `layers` layers."""
    in_int8, projections = settings.layers_in_int8(layers), settings.projections_in_int8()
    parts = {
        "attn/qkv_proj": "qkv_proj",
        "attn/o_proj": "o_proj",
        "mlp/gate_proj": "gate_up_proj",
        "mlp/up_proj": "gate_up_proj",
        "mlp/down_proj": "down_proj",
    }
    nodes = {}
    for layer in range(layers):
        for part, projection in parts.items():
            bits = 8 if layer in in_int8 and projection in projections else 4
            name = f"/model/layers.{layer}/{part}/MatMulNBits"
            nodes[name] = _wanted(settings, projection, bits)
    nodes["/lm_head/MatMulNBits"] = _wanted(settings, "lm_head", settings.head_bits())
    return nodes


def _wanted(settings: QuantizationSettings, matrix: str, bits: int) -> dict[str, int]:
    return {
        "bits": bits,
        "block_size": settings.block_size_of(matrix, bits),
        "accuracy_level": settings.accuracy_level,
    }


def _attributes(node: onnx.NodeProto) -> dict[str, int]:
    return {attribute.name: attribute.i for attribute in node.attribute}


def _embedding(graph: onnx.GraphProto) -> str:
    for node in graph.node:
        if node.op_type == "GatherBlockQuantized":
            shared = "" if node.input[0].startswith("model.embed_tokens") else " (shared)"
            return f"int{_attributes(node)['bits']}{shared}"
    return "float"


def _data_problems(graph: onnx.GraphProto, onnx_dir: Path) -> list[str]:
    end = 0
    for tensor in graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place:
            end = max(end, int(place.get("offset", 0)) + int(place["length"]))
    data = onnx_dir / DATA_FILE
    size = data.stat().st_size if data.is_file() else 0
    if size != end:
        return [f"{DATA_FILE} has {size:,} bytes, the graph needs {end:,}"]
    return []


def _probe(onnx_dir: Path) -> int:
    try:
        # A graph for a GPU runs without one too, on the machine that builds it.
        config = session_config(og, onnx_dir, provider_here(og, onnx_dir), usable_cores())
        model = og.Model(config)
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(_PROBE) + 1)
        generator = og.Generator(model, params)
        generator.append_tokens(np.array([_PROBE], dtype=np.int32))
        logits: Any = generator.get_output("logits")
    except Exception as error:
        raise ProjectError(f"{onnx_dir} does not run in onnxruntime-genai: {error}") from error
    if not np.isfinite(logits).all():
        raise ProjectError(f"{onnx_dir} gives logits that are not finite numbers")
    return int(logits.shape[-1])
