"""Quantize a checkpoint to int4, tensor by tensor, into a checkpoint that onnxruntime-genai reads.

    mlflow run . -e quantize -P profile=smollm2-135m
    python -m steps.quantize --profile phi-3-mini-4k --algorithm rtn --block-size 64

Only a few tensors are in memory at any time, whatever the size of the model. The result is still
in Hugging Face's layout (GPTQ format), and the same checkpoint and settings give the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phi3_mlflow.artifacts.manifests import sha256_of_file
from phi3_mlflow.artifacts.provenance import content_digest, read_provenance, write_provenance
from phi3_mlflow.core import console
from phi3_mlflow.core.errors import UserError
from phi3_mlflow.core.metrics import numbers
from phi3_mlflow.core.progress import show_progress
from phi3_mlflow.pipeline.inputs import full_precision
from phi3_mlflow.pipeline.step import NoRecord, Settings, Step, Work, step_parameters
from phi3_mlflow.quantization.settings import GptqSettings, QuantizationSettings

if TYPE_CHECKING:
    from phi3_mlflow.artifacts.cache import StepCache
    from phi3_mlflow.artifacts.inputs import Folder
    from phi3_mlflow.config.parameters import Request


@dataclass(frozen=True)
class QuantizeInputs:
    """A float checkpoint."""

    checkpoint: Folder


class Quantize(Step[QuantizeInputs, NoRecord]):
    """Checkpoint to int4 checkpoint."""

    name = "quantize"
    doing = "rounding the weights to int4"
    parameters = step_parameters("checkpoint", "algorithm", "block_size")

    def inputs(self, request: Request, cache: StepCache) -> QuantizeInputs:
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
        return QuantizeInputs(full_precision(request, cache))

    def settings(self, request: Request) -> Settings:
        return quantization_values(request.profile.quantization)

    def foresee(self, request: Request, inputs: QuantizeInputs) -> str:
        from phi3_mlflow.quantization.preflight import needs

        needed = needs(inputs.checkpoint.value, request.profile.quantization)
        return (
            f"{needed.memory / 1e9:.1f} GB of memory and, with the export, "
            f"{needed.disk / 1e9:.1f} GB of disk"
        )

    def work(self, work: Work[QuantizeInputs]) -> None:
        from phi3_mlflow.quantization.preflight import preflight
        from phi3_mlflow.quantization.quantize import quantize_checkpoint

        checkpoint = work.inputs.checkpoint.value
        chosen = work.request.profile.quantization
        needed = preflight(checkpoint, chosen, work.out)
        console.say(
            f"  this and the export need {needed.memory / 1e9:.1f} GB of memory and "
            f"{needed.disk / 1e9:.1f} GB of disk; there is enough"
        )
        report = quantize_checkpoint(checkpoint, work.out, chosen, show_progress)
        work.metrics.update(numbers(report))
        write_provenance(
            work.out,
            read_provenance(checkpoint)
            | {
                "algorithm": chosen.algorithm,
                "precision": "int4",
                "quantization": work.settings,
                "quantized_sha256": content_digest(work.out),
            },
        )


def quantization_values(chosen: QuantizationSettings) -> dict[str, Any]:
    """Quantization settings as JSON values; of calibration texts the content, not the place."""
    values = chosen.model_dump(mode="json")
    if isinstance(chosen, GptqSettings) and chosen.calibration is not None:
        values["calibration"] = sha256_of_file(chosen.calibration)
    return values


STEP = Quantize()
