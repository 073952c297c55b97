"""Fine-tune a checkpoint on rows of your own with LoRA, and merge the adapter into it.

    mlflow run . --env-manager local -e train -P data=$PWD/tickets.jsonl
    python -m steps.train --profile my-profile.yaml

Takes JSONL, CSV or Parquet with messages, prompt and completion, ShareGPT or Alpaca columns; loss
is only on what the assistant says. The result is a checkpoint like that of `fetch`, which the steps
after it take, with `adapter/` in PEFT's format, `training.json`, and in `validation.jsonl` the rows
that it is validated with. A killed run goes on where it was, and the same checkpoint, rows and
settings give the same bytes. A model that is too large for the machine's memory is read layer by
layer (`train.engine`).
"""

from __future__ import annotations

import json
import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phi3_mlflow.artifacts.provenance import (
    ADAPTER_FOLDER,
    content_digest,
    read_provenance,
    write_provenance,
)
from phi3_mlflow.core import console
from phi3_mlflow.core.errors import UserError
from phi3_mlflow.core.progress import Meter, show_progress
from phi3_mlflow.pipeline.inputs import CHECKPOINT, folder_input, rows_input
from phi3_mlflow.pipeline.step import NoRecord, Settings, Step, Work, step_parameters
from phi3_mlflow.pipeline.unfinished import drop_kept_work, kept_work
from phi3_mlflow.training.settings import ROWS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from phi3_mlflow.artifacts.cache import Entry, StepCache
    from phi3_mlflow.artifacts.inputs import Folder, Input
    from phi3_mlflow.config.parameters import Request
    from phi3_mlflow.tracking.runs import StepRun
    from phi3_mlflow.training.data import TrainingData
    from phi3_mlflow.training.masking import TokenizedRows
    from phi3_mlflow.training.run import Trained
    from phi3_mlflow.training.settings import TrainSettings

_NAMED = 20  # rows that are too long
_ENGINES = {
    "memory": "with the whole model in memory",
    "streamed": "with the model read layer by layer",
}
_DECIDES_NO_BYTE = {*ROWS, "log_as"}


@dataclass(frozen=True)
class TrainInputs:
    """A float checkpoint, the rows, and texts to rehearse."""

    checkpoint: Folder
    data: Input[Path]
    validation: Input[Path] | None = None
    rehearsal: Input[Path] | None = None


class Train(Step[TrainInputs, NoRecord]):
    """Checkpoint and rows to fine-tuned checkpoint."""

    name = "train"
    doing = "fine-tuning the checkpoint on the profile's rows"
    parameters = step_parameters("checkpoint", "data")

    def inputs(self, request: Request, cache: StepCache) -> TrainInputs:
        chosen = settings_of(request)
        data = rows_input("train.data", chosen.data)
        others = {
            key: rows_input(f"train.{key}", place) if place else None
            for key, place in (("validation", chosen.validation), ("rehearsal", chosen.rehearsal))
        }
        checkpoint = folder_input(request, cache, "checkpoint", "fetch", CHECKPOINT)
        return TrainInputs(checkpoint, data, **others)

    def settings(self, request: Request) -> Settings:
        return settings_of(request).model_dump(mode="json", exclude=_DECIDES_NO_BYTE)

    def decided(self, request: Request, inputs: TrainInputs) -> Settings:
        from phi3_mlflow.stages.engine import engine_of

        given = inputs.validation
        engine = engine_of(
            settings_of(request),
            inputs.checkpoint.value,
            inputs.data.value,
            given.value if given else None,
        )
        return {**self.settings(request), "engine": engine}

    def run(self, request: Request) -> None:
        """Do the step; in the others of several processes, take part in the training."""
        from phi3_mlflow.training import processes

        if processes.is_first():
            with processes.leading():
                super().run(request)
        else:
            from phi3_mlflow.training.train import follow

            follow()

    def work(self, work: Work[TrainInputs]) -> None:
        from phi3_mlflow.checkpoints.validate import validate_checkpoint
        from phi3_mlflow.stages.overlap import refuse_overlap
        from phi3_mlflow.training.lora import require_room
        from phi3_mlflow.training.merge import merge_adapter
        from phi3_mlflow.training.task import write_validation

        _require_processes(work.request)
        checkpoint, chosen = work.inputs.checkpoint.value, _chosen(work)
        require_room(checkpoint, chosen, work.cache.root)
        data = _load(work)
        refuse_overlap(work.request.profile, data, allowed=chosen.allow_overlap)
        rows, validation = _tokenize(checkpoint, data, chosen)
        work.run.log_rows("train", work.inputs.data, len(rows.rows))
        if given := work.inputs.validation:
            work.run.log_rows("validation", given, len(data.validation))
        rehearsal = _rehearsal(work, data)
        with kept_work(self, work) as folder:
            adapter = folder / "adapter"
            adapter.mkdir(exist_ok=True)
            trained = _train(work, rows, validation, rehearsal, adapter)
            merged = merge_adapter(checkpoint, adapter, work.out, show_progress)
            validate_checkpoint(work.out)
            shutil.copytree(adapter, work.out / ADAPTER_FOLDER)
        facts = _facts(work, data, rows, trained)
        text = json.dumps({**facts, "curve": trained.curve}, indent=2, sort_keys=True) + "\n"
        (work.out / "training.json").write_text(text, "utf-8")
        used = {row.id for row in validation.rows} if validation else set()
        write_validation(work.out, data.validation, used)
        known = read_provenance(checkpoint)
        write_provenance(
            work.out,
            known
            | {
                "adapter_sha256": trained.adapter_sha256,
                "base_checkpoint_sha256": known.get("checkpoint_sha256")
                or content_digest(checkpoint),
                "checkpoint_sha256": content_digest(work.out),
                "data_sha256": data.data_sha256,
                "trained_on": trained_on(facts),
                "training": {"settings": facts["settings"], "rows": _rows_used(work.inputs)},
            },
        )
        work.metrics.update({k: float(v) for k, v in facts.items() if isinstance(v, int | float)})
        work.metrics["merged_matrices"] = float(merged.matrices)
        work.run.log_training(work.out / ADAPTER_FOLDER, work.out / "training.json")
        console.say(f"  trained on {trained_on(facts)}")

    def after(self, request: Request, entry: Entry) -> None:
        """Drop the checkpoints of a run whose output is there."""
        drop_kept_work(self, entry)


def settings_of(request: Request) -> TrainSettings:
    """The profile's section `train`.

    Raises:
        UserError: it has none.
    """
    chosen = request.profile.train
    if chosen is None:
        raise UserError(
            f"train has nothing to do: profile {request.profile.name} has no section train with "
            "rows.\n"
            "Give the rows with -P data=FILE, or write them into the profile:\n"
            "  train:\n    data: FILE"
        )
    return chosen


def _chosen(work: Work[TrainInputs]) -> TrainSettings:
    """The settings, with the engine that has been decided on."""
    return settings_of(work.request).model_copy(update={"engine": work.settings["engine"]})


def _require_processes(request: Request) -> None:
    from phi3_mlflow.training import processes

    if not processes.is_first():  # main is no step that several processes can do
        raise UserError(
            "several processes were started to do all steps. Start the step train that way, "
            "python -m steps.train, and then main by itself: it takes what train has left."
        )
    wanted, there = settings_of(request).num_processes, processes.count()
    if wanted != there:
        way_out = (
            f"Start the step with  accelerate launch --num_processes {wanted} -m steps.train "
            f"--profile {request.value('profile')}  (on a CPU: torchrun --nproc-per-node {wanted} "
            "-m steps.train ...); main then takes what it has left."
        )
        raise UserError(
            f"train.num_processes is {wanted}, and the step was started as "
            f"{'one process' if there == 1 else f'{there} processes'}. How many there are decides "
            "the result, so it is a setting.\n"
            + (way_out if wanted > 1 else f"Set it to {there}, or start the step by itself.")
        )


def trained_on(facts: Mapping[str, Any]) -> str:
    """A line on what a checkpoint was trained on, and how much."""
    rows, loss, tokens = facts["train_rows"], facts["loss_tokens"], facts["tokens"]
    return (
        f"{rows:,} rows, {facts['epochs']:g} epochs of {loss:,} tokens with loss "
        f"({tokens:,} in all), {facts['steps']:,} steps"
    )


def _rows_used(inputs: TrainInputs) -> dict[str, Any]:
    """What identifies the rows, for those who have to find them again; not where they are."""
    named = {key: getattr(inputs, key) for key in ROWS}
    return {
        key: {"sha256": rows.digest, "files": dict(rows.files)}
        for key, rows in named.items()
        if rows is not None
    }


def _load(work: Work[TrainInputs]) -> TrainingData:
    from phi3_mlflow.stages.row_checks import refuse_faulty_checks
    from phi3_mlflow.training.data import load_training

    chosen = settings_of(work.request)
    given = work.inputs.validation
    data = load_training(
        work.inputs.data.value,
        format=chosen.format,
        validation=given.value if given else None,
        validation_share=chosen.validation_share,
    )
    found = {work.inputs.data.shown: (work.inputs.data.digest, data.data_sha256)}
    if given:
        found[given.shown] = given.digest, data.validation_sha256 or ""
    for file, (before, now) in found.items():
        if before != now:
            raise UserError(f"{file} changed while it was read; run it again when it is written")
    if given:
        files = {work.inputs.data.shown: data.train, given.shown: data.validation}
    else:
        files = {work.inputs.data.shown: (*data.train, *data.validation)}
    refuse_faulty_checks(files)
    console.say(
        f"  {len(data.train)} rows to train on, {len(data.validation)} to validate with, read as "
        f"{data.format}"
    )
    if data.ignored:
        console.say(f"  columns that are not read: {', '.join(data.ignored)}")
    return data


def _tokenize(
    checkpoint: Path, data: TrainingData, chosen: TrainSettings
) -> tuple[TokenizedRows, TokenizedRows | None]:
    from phi3_mlflow.training.masking import tokenize_rows

    rows = tokenize_rows(checkpoint, data.train, max_length=chosen.max_length)
    validation = None
    if data.validation:
        validation = tokenize_rows(checkpoint, data.validation, max_length=chosen.max_length)
    for name, some in (("train", rows), ("validation", validation)):
        if some and some.too_long:
            named = "; ".join(some.too_long[:_NAMED])
            console.say(
                f"  {len(some.too_long)} {name} rows have more than max_length "
                f"{chosen.max_length:,} tokens and are left out: {named}"
            )
    console.say(f"  {rows.loss_tokens:,} of {rows.tokens:,} tokens carry loss; in the first row:")
    for line in rows.shown(rows.rows[0]).splitlines():
        console.say(f"    {line}")
    return rows, validation


def _rehearsal(work: Work[TrainInputs], data: TrainingData) -> list[tuple[int, ...]]:
    """The texts on which the model is held to what it was, in pieces."""
    from phi3_mlflow.stages.overlap import without_overlap
    from phi3_mlflow.training.rehearsal import read_rehearsal, rehearsal_pieces

    given = work.inputs.rehearsal
    if given is None:
        return []
    texts = without_overlap(work.request.profile, data, read_rehearsal(given.value))
    pieces = rehearsal_pieces(work.inputs.checkpoint.value, texts)
    work.run.log_rows("rehearsal", given, len(texts))
    console.say(
        f"  {len(texts)} texts to rehearse, {sum(map(len, pieces)):,} tokens, "
        f"{settings_of(work.request).rehearsal_tokens} beside each batch"
    )
    return pieces


def _train(
    work: Work[TrainInputs],
    rows: TokenizedRows,
    validation: TokenizedRows | None,
    rehearsal: list[tuple[int, ...]],
    adapter: Path,
) -> Trained:
    from phi3_mlflow.stages.engine import require_memory_for

    chosen = _chosen(work)
    if needed := require_memory_for(work.inputs.checkpoint.value, chosen, rows):
        work.metrics["estimated_memory_bytes"] = float(needed.total)
    # Each engine with libraries of its own: those of the other take memory, too.
    if chosen.engine == "streamed":
        from phi3_mlflow.training.streamed import train
    else:
        from phi3_mlflow.training.train import train

    console.say(f"  {_ENGINES[chosen.engine]} (train.engine: {chosen.engine})")
    with ExitStack() as shown:
        return train(
            work.inputs.checkpoint.value,
            rows.rows,
            validation.rows if validation else (),
            chosen,
            folder=adapter.parent / "run",
            out=adapter,
            base_model=work.request.profile.base_model,
            listener=_Listener(work.run, shown),
            rehearsal=rehearsal,
        )


class _Listener:
    """Shows the progress, and logs the curve as it comes."""

    def __init__(self, run: StepRun, shown: ExitStack) -> None:
        self._run, self._shown = run, shown
        self._meter: Meter | None = None
        self._steps = self._first = 0
        self._began = 0.0

    def begins(self, step: int, steps: int) -> None:
        if step:
            console.say(f"  going on after step {step} of {steps}")
        self._first, self._steps, self._began = step, steps, time.monotonic()

    def point(self, step: int, values: Mapping[str, float]) -> None:
        left = {}
        if "loss" in values:
            self._shown_meter().advance(1)
            each = (time.monotonic() - self._began) / (step - self._first)
            left = {"seconds_left": each * (self._steps - step)}
        elif step == self._first:
            # What was validated before the first step says nothing about how long a step takes.
            console.say(f"  before training: loss {values['validation_loss']:.3f} in validation")
            self._began = time.monotonic()
            self._shown_meter()
        self._run.log_point(step, {**values, **left})

    def _shown_meter(self) -> Meter:
        if self._meter is None:
            progress = show_progress("training", self._steps - self._first, "steps")
            self._meter = self._shown.enter_context(progress)
        return self._meter


def _facts(
    work: Work[TrainInputs], data: TrainingData, rows: TokenizedRows, trained: Trained
) -> dict[str, Any]:
    """What `training.json` says besides the curve: nothing that differs between equal runs."""
    return {
        "adapter_sha256": trained.adapter_sha256,
        "chosen_step": trained.chosen_step,
        "data_sha256": data.data_sha256,
        "epochs": trained.curve[-1]["epoch"],
        "final_loss": trained.last("loss"),
        "final_validation_loss": trained.last("validation_loss"),
        "format": data.format,
        "loss_tokens": rows.loss_tokens,
        # Whether an overlap was allowed decides nothing about what has come out.
        "settings": {k: v for k, v in work.settings.items() if k != "allow_overlap"},
        "steps": trained.steps,
        "tokens": rows.tokens,
        "too_long_rows": len(rows.too_long),
        "train_rows": len(rows.rows),
        "validation_rows": len(data.validation),
        "validation_sha256": data.validation_sha256,
    }


STEP = Train()
