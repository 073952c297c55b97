"""The training run: trl's trainer on rows of tokens, with a LoRA adapter, to the same bytes.

What decides the adapter is the checkpoint, the rows and the settings: the order of the rows and the
adapter's first values come from the seed, sums are cut up by a fixed number of threads. A run that
was killed goes on from its last checkpoint and ends with the bytes of one that was not.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    set_seed,
)
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from phi3_mlflow.artifacts.manifests import sha256_of_file
from phi3_mlflow.checkpoints.reader import CheckpointReader
from phi3_mlflow.core.errors import UserError
from phi3_mlflow.core.progress import hide_bars_of_transformers
from phi3_mlflow.training import processes, resume
from phi3_mlflow.training.lora import adapted_tensors, lora_config
from phi3_mlflow.training.packing import Pack, PackCollator, pack, tokens_in
from phi3_mlflow.training.processes import Job
from phi3_mlflow.training.tokens import IGNORED, labels_of
from phi3_mlflow.training.watch import Listener, Stopped, Watch, named_values, out_of_patience

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from phi3_mlflow.training.settings import TrainSettings
    from phi3_mlflow.training.tokens import Row

ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
_KEPT = 2  # checkpoints


@dataclass(frozen=True)
class Trained:
    """How a run ended.

    Attributes:
        adapter_sha256: of the adapter's tensors.
        steps: of the optimizer, those of the whole run.
        chosen_step: the one that the adapter is of.
        curve: one mapping per step: `step`, `epoch`, `loss`, `learning_rate`, `grad_norm`, or
            `step`, `epoch`, `validation_loss`. No times: equal runs give equal curves.
    """

    adapter_sha256: str
    steps: int
    chosen_step: int
    curve: tuple[dict[str, float], ...]

    def last(self, name: str) -> float | None:
        """The last value of a name in the curve, None where there is none."""
        return next((point[name] for point in reversed(self.curve) if name in point), None)


def train(
    checkpoint: Path,
    rows: Sequence[Row],
    validation: Sequence[Row],
    settings: TrainSettings,
    *,
    folder: Path,
    out: Path,
    base_model: str,
    listener: Listener,
) -> Trained:
    """Train an adapter, or go on where an earlier run of the same was stopped.

    Args:
        checkpoint: a float checkpoint in Hugging Face layout.
        rows: to train on.
        validation: to measure the loss on; may be empty.
        settings: the choices.
        folder: keeps the run's own checkpoints, for the same work and nothing else.
        out: an existing directory, for the adapter in PEFT's format.
        base_model: the name that the adapter's configuration gives its model; not a path.
        listener: is told the curve.

    Raises:
        UserError: there is nothing to train on, target modules that the model does not have, or a
            loss that is no number or far off; says at which step.
    """
    if not rows:
        raise UserError("there is no row to train on")
    if settings.early_stopping_patience and not validation:
        raise UserError(
            "train.early_stopping_patience needs rows to validate with: give train.validation or "
            "a train.validation_share above 0"
        )
    adapted_tensors(CheckpointReader(checkpoint), settings.target_modules)
    folder.mkdir(parents=True, exist_ok=True)
    ended = resume.finished(folder)
    if ended is None:
        start = resume.last_whole(folder)
        if not (start and out_of_patience(resume.state_of(start)["log_history"], settings)):
            job = Job(checkpoint, rows, validation, settings, folder, start)
            processes.hand_out(job)
            _run(job, listener)
        last = resume.last_whole(folder)
        if last is None:  # the trainer saves after its last step
            raise RuntimeError("training ended without a checkpoint")
        ended = last, _chosen(last, settings)
        resume.set_finished(folder, *ended)
    last, chosen = ended
    _write_adapter(chosen, out, base_model)
    return Trained(
        adapter_sha256=sha256_of_file(out / ADAPTER),
        steps=int(resume.state_of(last)["global_step"]),
        chosen_step=int(resume.state_of(chosen)["global_step"]),
        curve=_curve(resume.state_of(last)["log_history"]),
    )


def follow() -> None:
    """Take part in a training that another process leads, if it comes to one."""
    job = processes.receive()
    if job is not None:
        with suppress(Stopped):  # which the other process has told
            _run(job, _Deaf())


class _Deaf:
    """Told what somebody else tells."""

    def begins(self, step: int, steps: int) -> None:
        pass

    def point(self, step: int, values: Mapping[str, float]) -> None:
        pass


def _run(job: Job, listener: Listener) -> None:
    with _reproducible(job.settings.threads):
        _trainer(job, listener).train(resume_from_checkpoint=str(job.start) if job.start else None)


def _trainer(job: Job, listener: Listener) -> Any:
    settings, rows = job.settings, job.rows
    on_gpu = torch.cuda.is_available()
    hide_bars_of_transformers()
    model: Any = AutoModelForCausalLM.from_pretrained(
        job.checkpoint,
        dtype=torch.bfloat16 if on_gpu else torch.float32,
        local_files_only=True,
        use_safetensors=True,
    )
    tokenizer: Any = AutoTokenizer.from_pretrained(job.checkpoint, local_files_only=True)
    collator = PackCollator(tokenizer.pad_token_id or 0) if settings.packing else None
    rows = pack(rows, settings.max_length) if settings.packing else rows
    set_seed(settings.seed)  # the trainer sets it after the adapter has its first values
    trainer = _Trainer(
        model=get_peft_model(model, lora_config(settings)),
        args=_arguments(job, on_gpu=on_gpu),
        train_dataset=as_dataset(rows),
        eval_dataset=as_dataset(job.validation) if job.validation else None,
        processing_class=tokenizer,
        data_collator=collator,
        callbacks=[Watch(settings, listener, job.folder, vocabulary=model.config.vocab_size)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.data_collator = _CheckedOnce(trainer.data_collator, rows)
    return trainer


def _arguments(job: Job, *, on_gpu: bool) -> SFTConfig:
    settings, validates = job.settings, bool(job.validation)
    patient = settings.early_stopping_patience > 0
    arguments = SFTConfig(
        output_dir=str(job.folder),
        learning_rate=settings.learning_rate,
        num_train_epochs=settings.num_train_epochs,
        per_device_train_batch_size=settings.per_device_train_batch_size,
        per_device_eval_batch_size=settings.per_device_train_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        warmup_steps=settings.warmup_ratio,  # below 1 it is a share
        lr_scheduler_type=settings.lr_scheduler_type,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        seed=settings.seed,
        data_seed=settings.seed,
        max_length=None,  # rows that are too long have been left out, none is cut
        completion_only_loss=False,  # the labels say it
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=_KEPT,
        eval_strategy="steps" if validates else "no",
        eval_steps=settings.save_steps if validates else None,
        eval_on_start=validates and job.start is None,
        metric_for_best_model="eval_loss" if patient else None,
        greater_is_better=False if patient else None,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not on_gpu,
        bf16=on_gpu,
        dataloader_pin_memory=on_gpu,
        ddp_backend="gloo" if processes.count() > 1 and not on_gpu else None,
        ddp_find_unused_parameters=False,
    )
    # Of several GPUs a process takes one, and does not cut its batches up among all.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    if arguments.device.type == "cpu":
        # The name that accelerate has for the CPUs of several processes, cpu:0, is none to torch
        # when an optimizer is loaded.
        arguments._setup_devices = torch.device("cpu")
    return arguments


class _Trainer(SFTTrainer):
    """trl's trainer, which tells nobody that it runs, and writes no cards into checkpoints."""

    def _send_telemetry(self) -> None:
        pass

    def create_model_card(self, *arguments: Any, **named: Any) -> None:
        pass

    def compute_loss(self, model: Any, inputs: dict[str, Any], *more: Any, **named: Any) -> Any:
        """The loss; of packed rows, trl counts the tokens of one sequence of the batch alone."""
        before = self._total_train_tokens
        loss = super().compute_loss(model, inputs, *more, **named)  # type: ignore[no-untyped-call]
        if model.training and "attention_mask" not in inputs:
            tokens = self.accelerator.gather_for_metrics(tokens_in(inputs["position_ids"]))
            self._total_train_tokens = before + int(tokens.sum())
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return loss


class _CheckedOnce:
    """Makes batches, and compares the labels of the first with what the rows' masks say.

    The rows pass through a trainer that has its own ideas of what carries loss.
    """

    def __init__(self, collate: Any, rows: Sequence[Row]) -> None:
        self._collate = collate
        self._labels: dict[tuple[int, ...], list[tuple[int, ...]]] | None = {}
        for row in rows:
            self._labels.setdefault(tuple(row.input_ids), []).append(tuple(labels_of(row)))

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        batch = self._collate(examples)
        if self._labels is not None and self._of_training(examples):
            for example, labels in zip(examples, batch["labels"].tolist(), strict=True):
                length = len(example["input_ids"])
                meant = self._labels[tuple(example["input_ids"])]
                padding = set(labels[length:]) - {IGNORED}
                if tuple(labels[:length]) not in meant or padding:
                    raise RuntimeError("the trainer's labels are not those of the loss mask")
            self._labels = None
        return batch

    def _of_training(self, examples: list[dict[str, Any]]) -> bool:
        return all(tuple(one["input_ids"]) in (self._labels or {}) for one in examples)


def as_dataset(rows: Sequence[Row]) -> Dataset:
    """Rows as trl takes them when they are tokens already: columns `input_ids` and `labels`.

    Packed ones have `seq_lengths`, as trl calls it, besides.
    """
    return Dataset.from_list(
        [
            {"input_ids": list(row.input_ids), "labels": labels_of(row)}
            | ({"seq_lengths": list(row.lengths)} if isinstance(row, Pack) else {})
            for row in rows
        ]
    )


def _chosen(last: Path, settings: TrainSettings) -> Path:
    """The checkpoint with the lowest validation loss where stopping early is on, or the last."""
    best = resume.state_of(last).get("best_global_step")
    if not settings.early_stopping_patience or not best:
        return last
    return last.with_name(f"checkpoint-{best}")


def _write_adapter(chosen: Path, out: Path, base_model: str) -> None:
    """Copy the adapter of a checkpoint, with nothing of this machine in its configuration."""
    shutil.copyfile(chosen / ADAPTER, out / ADAPTER)
    config = json.loads((chosen / ADAPTER_CONFIG).read_text("utf-8"))
    config["base_model_name_or_path"] = base_model
    config["target_modules"] = sorted(config["target_modules"])  # a set has no order
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (out / ADAPTER_CONFIG).write_text(text, "utf-8")


def _curve(history: Sequence[Mapping[str, float]]) -> tuple[dict[str, float], ...]:
    return tuple(
        {"step": point["step"], "epoch": point["epoch"], **values}
        for point in history
        if (values := named_values(point))
    )


@contextmanager
def _reproducible(threads: int) -> Iterator[None]:
    """So many threads, and of two ways to compute something the one that always gives the same."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.get_num_threads()
    strict = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    deterministic: Any = torch.utils.deterministic
    fills = deterministic.fill_uninitialized_memory
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Finds code that reads what nobody wrote; it takes half as much memory again, and time.
    deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        deterministic.fill_uninitialized_memory = fills
        torch.use_deterministic_algorithms(strict, warn_only=warns)
        torch.set_num_threads(before)
