"""Quantize a checkpoint to int4, tensor by tensor, into a checkpoint that onnxruntime-genai reads.

    mlflow run . -e quantize -P profile=smollm2-135m
    python -m steps.quantize --profile phi-3-mini-4k --algorithm rtn --block-size 64

Only a few tensors are in memory at any time, whatever the size of the model. The result is still
in Hugging Face's layout (GPTQ format), and the same checkpoint and settings give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phi3_mlflow.artifacts.cache import StepCache
from phi3_mlflow.artifacts.manifests import sha256_of_file
from phi3_mlflow.artifacts.provenance import content_digest, read_provenance, write_provenance
from phi3_mlflow.config.parameters import Request
from phi3_mlflow.core import console
from phi3_mlflow.core.errors import UserError
from phi3_mlflow.core.progress import show_progress
from phi3_mlflow.pipeline.step import (
    CHECKPOINT,
    Input,
    Step,
    Work,
    figures,
    folder_input,
)


def inputs(request: Request, store: StepCache) -> dict[str, Input]:
    if not request.profile.quantizes:
        raise UserError(
            f"quantize has nothing to do for flavor {request.profile.flavor} with precision "
            f"{request.profile.precision}: only the ONNX flavor in int4 is quantized"
        )
    if request.profile.search.on:
        raise UserError(
            "quantize rounds in one way, and algorithm search is a choice among several: run\n"
            "  mlflow run . -e search\nwhich leaves the best candidate for the steps after it, "
            "or main, which does so by itself."
        )
    return {"checkpoint": folder_input(request, store, "checkpoint", "fetch", CHECKPOINT)}


def settings(request: Request) -> dict[str, Any]:
    chosen = request.profile.quantization
    values = chosen.model_dump(mode="json")
    if chosen.calibration is not None:  # its content decides, not where it lies
        values["calibration"] = sha256_of_file(chosen.calibration)
    return values


def foresee(request: Request, inputs: Mapping[str, Input]) -> str:
    from phi3_mlflow.quantization.preflight import needs

    needed = needs(inputs["checkpoint"].path, request.profile.quantization)
    return (
        f"{needed.memory / 1e9:.1f} GB of memory and, with the export, "
        f"{needed.disk / 1e9:.1f} GB of disk"
    )


def work(work: Work) -> None:
    from phi3_mlflow.quantization.preflight import preflight
    from phi3_mlflow.quantization.quantize import quantize_checkpoint

    checkpoint = work.inputs["checkpoint"].path
    needed = preflight(checkpoint, work.request.profile.quantization, work.out)
    console.say(
        f"  this and the export need {needed.memory / 1e9:.1f} GB of memory and "
        f"{needed.disk / 1e9:.1f} GB of disk; there is enough"
    )
    report = quantize_checkpoint(
        checkpoint, work.out, work.request.profile.quantization, show_progress
    )
    work.metrics.update(figures(report))
    write_provenance(
        work.out,
        read_provenance(checkpoint)
        | {
            "algorithm": work.request.profile.quantization.algorithm,
            "precision": "int4",
            "quantization": settings(work.request),
            "quantized_sha256": content_digest(work.out),
        },
    )


STEP = Step(
    name="quantize",
    summary="rounding the weights to int4",
    parameters=("checkpoint", "algorithm", "block_size"),
    inputs=inputs,
    settings=settings,
    work=work,
    foresee=foresee,
)
