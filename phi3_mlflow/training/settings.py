"""What can be chosen about training: the profile's section `train`.

What a user of trl and peft knows keeps its name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from phi3_mlflow.core.section import Section
from phi3_mlflow.rows.location import is_uri

ROWS = ("data", "validation", "rehearsal")
"""The settings that name files. Of these the content decides, and not the name."""
PROJECTIONS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")

Scheduler = Literal["linear", "cosine", "constant", "constant_with_warmup"]
Engine = Literal["memory", "streamed"]
Format = Literal["auto", "messages", "prompt_completion", "sharegpt", "alpaca"]


def _place(value: object) -> object:
    """A URI as it is; everything else is a path."""
    return Path(value) if isinstance(value, str) and not is_uri(value) else value


Rows = Annotated[Path | str, BeforeValidator(_place)]
"""Where rows are: a path, or a URI."""


class TrainSettings(Section):
    """LoRA on rows of conversations; equal settings, rows and checkpoints give equal bytes."""

    data: Rows = Field(
        description="rows to train on: .jsonl, .csv or .parquet, a folder of such files or a "
        "pattern of names (`rows/*.jsonl`), a URI that MLflow downloads from, or "
        "mlflow-dataset:NAME; a relative path counts from the profile's folder. Left out, the "
        "section only says how rows given with -P data=FILE are trained on"
    )
    format: Format = Field(
        default="auto",
        description="what a row is: messages, prompt_completion (keys prompt and completion), "
        "sharegpt (conversations) or alpaca (instruction, input, output); auto recognises it",
    )
    validation: Rows | None = Field(
        default=None,
        description="rows to validate with, in a place of their own; left out, validation_share",
    )
    validation_share: float = Field(
        default=0.1,
        ge=0,
        le=0.5,
        description="share of the rows set aside to validate with, chosen by their content, so "
        "that more rows never move one from one side to the other; without effect where "
        "validation is given",
    )
    rehearsal: Path | None = Field(
        default=None,
        description="a .jsonl file of texts and conversations that have nothing to do with the "
        "rows; on them the model is held to what it predicted before it was trained, so that it "
        "does not forget everything else. Left out, nothing is rehearsed. data/calibration.jsonl "
        "of the project will do",
    )
    rehearsal_tokens: int = Field(
        default=256,
        ge=128,
        le=65_536,
        multiple_of=128,
        description="tokens of these texts beside each batch of rows; without effect where "
        "nothing is rehearsed",
    )
    rehearsal_weight: float = Field(
        default=1.0,
        gt=0,
        le=1000,
        description="how much the divergence there counts beside the loss on the rows; without "
        "effect where nothing is rehearsed",
    )
    learning_rate: float = Field(
        default=2e-4, gt=0, le=100, description="of the optimizer AdamW, at its highest"
    )
    num_train_epochs: int = Field(
        default=1, ge=1, le=1000, description="how often every row is trained on"
    )
    max_length: int = Field(
        default=1024,
        ge=16,
        le=131_072,
        description="tokens per row; rows that are longer are counted, named and left out",
    )
    packing: bool = Field(
        default=False,
        description="lay several rows end to end into one sequence of up to max_length tokens; "
        "none sees another, none is cut, and a batch is then of sequences instead of rows",
    )
    per_device_train_batch_size: int = Field(
        default=8, ge=1, le=1024, description="rows computed together"
    )
    gradient_accumulation_steps: int = Field(
        default=1, ge=1, le=1024, description="batches per step of the optimizer"
    )
    warmup_ratio: float = Field(
        default=0.03,
        ge=0,
        lt=1,
        description="share of the steps in which the learning rate rises from 0",
    )
    lr_scheduler_type: Scheduler = Field(
        default="cosine", description="how the learning rate goes on after that"
    )
    weight_decay: float = Field(default=0.0, ge=0, le=1, description="of AdamW")
    max_grad_norm: float = Field(
        default=1.0, gt=0, le=1000, description="norm to which larger gradients are scaled down"
    )
    lora_r: int = Field(default=16, ge=1, le=1024, description="rank of the adapter's matrices")
    lora_alpha: int = Field(
        default=32, gt=0, le=4096, description="the adapter counts lora_alpha / lora_r times"
    )
    lora_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="share of the adapter's inputs left out at random"
    )
    target_modules: tuple[str, ...] = Field(
        default=PROJECTIONS,
        min_length=1,
        description="the projections that get an adapter, by their names in the model",
    )
    engine: Literal["auto", Engine] = Field(
        default="auto",
        description="memory has the whole model in memory; streamed reads it layer by layer, "
        "forward and backward, needs a fraction of the memory and takes longer. auto is memory "
        "where the machine's memory suffices for that by the estimate, four fifths of all there "
        "is, and streamed where it does not; what else runs at the moment changes nothing. The "
        "two differ in the last bits: `training.json` says which one it was, the same version is "
        "made again with it, and naming it gives the same bytes on machines of any size",
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="compute activations twice, and keep fewer in memory; streamed always does",
    )
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**32,
        description="of the adapter's first values, the order of the rows and dropout",
    )
    threads: int = Field(
        default=2,
        ge=1,
        le=256,
        description="processor threads; the last bits of sums depend on them, so it is a setting "
        "and not the machine's number of cores",
    )
    num_processes: int = Field(
        default=1,
        ge=1,
        le=1024,
        description="processes that train together, each with per_device_train_batch_size rows; "
        "above 1, the step is started with accelerate launch or torchrun",
    )
    save_steps: int = Field(
        default=50,
        ge=1,
        description="steps from one checkpoint to the next; a killed run goes on from the last. "
        "Validation loss is measured as often",
    )
    early_stopping_patience: int = Field(
        default=0,
        ge=0,
        description="stop when the validation loss has not fallen so many times in a row, and keep "
        "the best; 0 never stops",
    )
    log_as: Literal["merged", "adapter"] = Field(
        default="merged",
        description="what the transformers flavor of the trained model is logged as: the merged "
        "checkpoint, or the checkpoint before training with the adapter beside it; both answer "
        "the same",
    )
    allow_overlap: bool = Field(
        default=False,
        description="train on rows that are also, or nearly, among those that measure the model",
    )

    @field_validator("target_modules")
    @classmethod
    def _each_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if twice := sorted({name for name in value if value.count(name) > 1}):
            raise ValueError(f"{', '.join(twice)} is listed more than once")
        return value

    @model_validator(mode="after")
    def _streamed_as_it_can(self) -> TrainSettings:
        if self.engine == "streamed" and (reasons := self.not_streamed()):
            raise ValueError(
                f"engine streamed has {' and '.join(reasons)}; change that, or choose engine memory"
            )
        return self

    def not_streamed(self) -> list[str]:
        """Which of the settings the engine streamed cannot do, and what it has instead."""
        reasons = []
        if self.num_processes > 1:
            reasons.append(f"one process alone, and num_processes is {self.num_processes}")
        if self.lora_dropout > 0:
            reasons.append(f"no dropout, and lora_dropout is {self.lora_dropout:g}")
        if self.rehearsal:
            reasons.append("nothing to rehearse, and rehearsal is given")
        return reasons
