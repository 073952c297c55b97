"""Export a checkpoint to a directory that onnxruntime-genai opens, and check what was built.

    mlflow run . --env-manager local -e export -P profile=smollm2-135m
    python -m steps.export --profile smollm2-135m --precision fp32

onnxruntime-genai's model builder makes the graph; the weights stream from the checkpoint into
the ONNX file one by one. Bits, block size and accuracy level of every node are compared with the
profile, and the model is loaded and asked for a token before it counts as done. A model whose
conversations would have other tokens than its own tokenizer makes of them is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from phi3_mlflow.artifacts.manifests import sha256_of_file
from phi3_mlflow.artifacts.provenance import content_digest, read_provenance, write_provenance
from phi3_mlflow.config.loading import CALIBRATION
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

_KV_TOKENS = 8192
"""Of the project's calibration texts, to find the scales of keys and values with."""


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
        in_int8 = profile.runtime.kv_cache == "int8"
        return {
            "precision": profile.precision,
            "accuracy_level": profile.quantization.accuracy_level,
            "provider": profile.runtime.provider,
            **({"kv_cache": {"int8": sha256_of_file(CALIBRATION)}} if in_int8 else {}),
        }

    def work(self, work: Work[ExportInputs]) -> None:
        from phi3_mlflow.checkpoints.reader import read_config
        from phi3_mlflow.genai.check import check_export
        from phi3_mlflow.genai.export import export_onnx
        from phi3_mlflow.genai.prompts import refuse_other_prompts
        from phi3_mlflow.quantization.calibration import calibration_sequences
        from phi3_mlflow.quantization.settings import GptqSettings

        profile = work.request.profile
        checkpoint = work.inputs.checkpoint.value
        texts: list[list[int]] = []
        if profile.runtime.kv_cache == "int8":
            read = GptqSettings(
                calibration=CALIBRATION,
                calibration_tokens=_KV_TOKENS,
                calibration_length=min(512, read_config(checkpoint)["max_position_embeddings"]),
            )
            texts = calibration_sequences(checkpoint, read).tolist()
        report = export_onnx(
            checkpoint,
            work.out,
            precision=profile.precision,
            accuracy_level=profile.quantization.accuracy_level,
            provider=profile.runtime.provider,
            kv_sequences=texts,
            progress=show_progress,
        )
        checked = check_export(work.out, profile.quantization if profile.quantizes else None)
        if profile.contract == "chat":
            for difference in refuse_other_prompts(checkpoint, work.out):
                console.say(f"  the flavors differ: {difference}")
        work.metrics.update(numbers(report) | numbers(checked))
        write_provenance(
            work.out,
            {"algorithm": "none"}
            | read_provenance(checkpoint)
            | {"precision": profile.precision, "artifact_sha256": content_digest(work.out)},
        )


STEP = Export()
