"""The engine that has the model in memory: trl's trainer on rows of tokens, with a LoRA adapter."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
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

from phi3_mlflow.core.errors import EnvironmentProblem
from phi3_mlflow.core.progress import hide_bars_of_transformers
from phi3_mlflow.training import processes
from phi3_mlflow.training.lora import lora_config
from phi3_mlflow.training.memory import less
from phi3_mlflow.training.packing import Pack, PackCollator, pack, tokens_in
from phi3_mlflow.training.rehearsal import PIECE, Rehearsal
from phi3_mlflow.training.run import KEPT, carry_out, reproducible
from phi3_mlflow.training.tokens import IGNORED, labels_of
from phi3_mlflow.training.watch import Listener, Stopped, Watch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from phi3_mlflow.training.processes import Job
    from phi3_mlflow.training.tokens import Row


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
    start = str(job.start) if job.start else None
    with reproducible(job.settings.threads, on_gpu=torch.cuda.is_available()):
        try:
            _trainer(job, listener).train(resume_from_checkpoint=start)
        except torch.OutOfMemoryError as error:
            raise _gpu_is_too_small(job) from error


def _gpu_is_too_small(job: Job) -> EnvironmentProblem:
    settings, gpu = job.settings, torch.cuda.get_device_properties(torch.cuda.current_device())
    batch = settings.per_device_train_batch_size
    tokens = max(len(row.input_ids) for row in job.rows)
    ways = [text for text, _ in less(settings)]
    ways.append("a smaller train.max_length, which leaves out longer rows")
    if not settings.not_streamed():
        ways.append("train.engine: streamed, which computes on the CPU, layer by layer")
    return EnvironmentProblem(
        f"the GPU has too little memory to train with a batch of {batch} x {tokens:,} tokens: "
        f"{gpu.name}, {gpu.total_memory / 1e9:.1f} GB, and other programs may hold some of it. "
        f"What takes less: {'; '.join(ways)}."
    )


train = partial(carry_out, _run)
"""Train an adapter with the model in memory; the arguments are `carry_out`'s, less the first."""


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
    if job.rehearsal:
        each = settings.rehearsal_tokens // PIECE
        trainer.rehearsal = Rehearsal(job.rehearsal, each, settings.seed)
        trainer.rehearsal_weight = settings.rehearsal_weight
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
        save_total_limit=KEPT,
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
    """trl's trainer, which tells nobody that it runs, and writes no cards into checkpoints.

    Attributes:
        rehearsal: what is rehearsed beside each batch, if anything.
        rehearsal_weight: how much the divergence there counts.
    """

    rehearsal: Rehearsal | None = None
    rehearsal_weight = 0.0
    _batch = (-1, 0)  # step, and batches of it that were computed

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
        if model.training and self.rehearsal:
            divergence = self.rehearsal.divergence(
                self.accelerator.unwrap_model(model), self._number()
            )
            self._metrics["train"]["rehearsal_kl"].append(divergence.item())
            held = self.rehearsal_weight * divergence / self.current_gradient_accumulation_steps
            loss = loss + held - held.detach()  # the loss that is told is that of the rows
        return loss

    def _number(self) -> int:
        """Of the batch, counted over all steps and processes."""
        step, done = self._batch
        done = done + 1 if step == self.state.global_step else 0
        self._batch = self.state.global_step, done
        number = self.state.global_step * self.args.gradient_accumulation_steps + done
        return int(number * self.accelerator.num_processes + self.accelerator.process_index)


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
