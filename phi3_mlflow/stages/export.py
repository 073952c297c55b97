"""Export a checkpoint to a directory that onnxruntime-genai opens, and check what was built.

    mlflow run . --env-manager local -e export -P profile=smollm2-135m
    python -m steps.export --profile smollm2-135m --precision fp32

onnxruntime-genai's model builder makes the graph; the weights stream from the checkpoint into
the ONNX file one by one. Bits, block size and accuracy level of every node are compared with the
profile, and the model is loaded and asked for a token before it counts as done.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from phi3_mlflow.artifacts.provenance import content_digest, read_provenance, write_provenance
from phi3_mlflow.core import console
from phi3_mlflow.core.errors import UserError
from phi3_mlflow.core.metrics import numbers
from phi3_mlflow.core.progress import show_progress
from phi3_mlflow.pipeline.inputs import CHECKPOINT, folder_input, full_precision
from phi3_mlflow.pipeline.step import NoRecord, Settings, Step, Work, step_parameters

if TYPE_CHECKING:
    from phi3_mlflow.artifacts.cache import StepCache
    from phi3_mlflow.artifacts.inputs import Folder
    from phi3_mlflow.config.parameters import Request


@dataclass(frozen=True)
class ExportInputs:
    """A checkpoint, in float or in int4."""

    checkpoint: Folder


class Export(Step[ExportInputs, NoRecord]):
    """Checkpoint to ONNX directory."""

    name = "export"
    doing = "building the ONNX model"
    parameters = step_parameters("checkpoint", "precision")

    def inputs(self, request: Request, cache: StepCache) -> ExportInputs:
        if not request.profile.makes_onnx:
            raise UserError("export has nothing to do for flavor transformers; choose onnx or both")
        if not request.profile.quantizes:
            return ExportInputs(full_precision(request, cache))
        return ExportInputs(folder_input(request, cache, "checkpoint", "quantize", CHECKPOINT))

    def settings(self, request: Request) -> Settings:
        profile = request.profile
        return {
            "precision": profile.precision,
            "accuracy_level": profile.quantization.accuracy_level,
            "provider": profile.runtime.provider,
        }

    def work(self, work: Work[ExportInputs]) -> None:
        from phi3_mlflow.genai.check import check_export
        from phi3_mlflow.genai.export import export_onnx
        from phi3_mlflow.genai.prompts import differing_prompts

        profile = work.request.profile
        checkpoint = work.inputs.checkpoint.value
        report = export_onnx(
            checkpoint,
            work.out,
            precision=profile.precision,
            accuracy_level=profile.quantization.accuracy_level,
            provider=profile.runtime.provider,
            progress=show_progress,
        )
        checked = check_export(work.out, profile.quantization if profile.quantizes else None)
        if profile.contract == "chat":
            for difference in differing_prompts(checkpoint, work.out):
                console.say(f"  the flavors differ: {difference}")
        work.metrics.update(numbers(report) | numbers(checked))
        write_provenance(
            work.out,
            {"algorithm": "none"}
            | read_provenance(checkpoint)
            | {"precision": profile.precision, "artifact_sha256": content_digest(work.out)},
        )


STEP = Export()
