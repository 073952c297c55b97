"""Quantize a checkpoint to int4, tensor by tensor, into a checkpoint that onnxruntime-genai reads.

    mlflow run . --env-manager local -e quantize -P profile=smollm2-135m
    python -m steps.quantize --profile phi-3-mini-4k --algorithm rtn --block-size 64

Only a few tensors are in memory at any time, whatever the size of the model. The result is still
in Hugging Face's layout (GPTQ format), and the same checkpoint and settings give the same bytes.
With algorithm gptq, which takes hours for a large model, a killed run goes on after the last layer
that it finished. A fine-tuned checkpoint can be calibrated with the rows that it was trained on.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phi3_mlflow.artifacts.manifests import sha256_of_file
from phi3_mlflow.artifacts.provenance import content_digest, read_provenance, write_provenance
from phi3_mlflow.core import console
from phi3_mlflow.core.errors import UserError
from phi3_mlflow.core.hints import run_command
from phi3_mlflow.core.metrics import numbers
from phi3_mlflow.core.progress import show_progress
from phi3_mlflow.pipeline.inputs import full_precision, rows_input
from phi3_mlflow.pipeline.step import NoRecord, Settings, Step, Work, step_parameters
from phi3_mlflow.pipeline.unfinished import drop_kept_work, kept_work
from phi3_mlflow.quantization.settings import GptqSettings, QuantizationSettings

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from phi3_mlflow.artifacts.cache import Entry, StepCache
    from phi3_mlflow.artifacts.inputs import Folder, Input
    from phi3_mlflow.config.parameters import Request
    from phi3_mlflow.rows.texts import Conversation


@dataclass(frozen=True)
class QuantizeInputs:
    """A float checkpoint, and the rows that it was trained on where they calibrate."""

    checkpoint: Folder
    rows: Input[Path] | None = None


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
                f"  {run_command('search')}\n"
                "which leaves the best candidate for the steps after it, or main, which does so by "
                "itself."
            )
        checkpoint = full_precision(request, cache)
        return QuantizeInputs(checkpoint, calibration_rows(request, checkpoint.value))

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
        known = read_provenance(checkpoint)
        rows = conversations(work.inputs.rows, known["training"]) if work.inputs.rows else []
        done = dict(work.settings)
        if isinstance(chosen, GptqSettings) and "training" in known:
            done["calibration_rows"] = chosen.share_of_rows(trained=True) if rows else 0.0
        with ExitStack() as held:
            folder = None
            if isinstance(chosen, GptqSettings):  # the others are done in seconds
                folder = held.enter_context(kept_work(self, work))
            report = quantize_checkpoint(
                checkpoint, work.out, chosen, show_progress, rows=rows, unfinished=folder
            )
        work.metrics.update(numbers(report))
        write_provenance(
            work.out,
            known
            | {
                "algorithm": chosen.algorithm,
                "precision": "int4",
                "quantization": done,
                "quantized_sha256": content_digest(work.out),
            },
        )

    def after(self, request: Request, entry: Entry) -> None:
        """Drop what was kept of unfinished work whose output is there."""
        drop_kept_work(self, entry)


def quantization_values(chosen: QuantizationSettings) -> dict[str, Any]:
    """Quantization settings as JSON values; of calibration texts the content, not the place."""
    values = chosen.model_dump(mode="json")
    if isinstance(chosen, GptqSettings) and chosen.calibration is not None:
        values["calibration"] = sha256_of_file(chosen.calibration)
    return values


def calibration_rows(request: Request, checkpoint: Path) -> Input[Path] | None:
    """The rows that a checkpoint was trained on, where GPTQ is to calibrate with them.

    Raises:
        UserError: they are asked for and the checkpoint was trained on none, or on others.
    """
    chosen, train = request.profile.quantization, request.profile.train
    if not isinstance(chosen, GptqSettings):
        return None
    training = read_provenance(checkpoint).get("training")
    if not chosen.share_of_rows(trained=training is not None):
        return None
    if training is None or train is None:
        if chosen.calibration_rows is None:
            return None
        missing = f"{checkpoint} was not fine-tuned" if training is None else "it has no train.data"
        raise UserError(
            f"quantization.calibration_rows of profile {request.profile.name} is "
            f"{chosen.calibration_rows:g}, and {missing}: leave it out, or train first"
        )
    rows = rows_input("train.data", train.data)
    wanted = training["rows"]["data"]["sha256"]
    if rows.digest != wanted:
        raise UserError(
            f"train.data: {rows.shown} is no longer what {checkpoint} was trained on (sha256 "
            f"{wanted}), and quantize calibrates with that: run train again, or set "
            "quantization.calibration_rows to 0"
        )
    return rows


def conversations(rows: Input[Path], training: Mapping[str, Any]) -> list[Conversation]:
    """The rows that were trained on, and none of those set aside, in an order that is all one."""
    from phi3_mlflow.training.data import load_training

    settings = training["settings"]
    share = 0.0 if "validation" in training["rows"] else settings["validation_share"]
    read = load_training(rows.value, format=settings["format"], validation_share=share)
    if read.data_sha256 != rows.digest:
        raise UserError(f"{rows.shown} changed while it was read; run it again when it is written")
    ordered = sorted(read.train, key=lambda row: row.id)
    return [[{"role": m.role, "content": m.content} for m in row.messages] for row in ordered]


STEP = Quantize()
