"""The profile's sections `evaluation` and `gate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from phi3_mlflow.core.section import Section

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class JudgeSettings(Section):
    """A model that judges the answers; its key comes from the environment."""

    model: str = Field(
        pattern=r"^[a-z][a-z0-9_.-]*:/[^/].*$",
        description="as MLflow's judges name it: openai:/MODEL, anthropic:/MODEL, gateway:/ROUTE",
    )
    correctness: bool = Field(default=True, description="does the answer hold what was expected?")
    guidelines: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")], str] = Field(
        default_factory=dict, description="name: what an answer has to keep to, in words"
    )

    @model_validator(mode="after")
    def _asks_something(self) -> JudgeSettings:
        if not self.metrics:
            raise ValueError("correctness is false and there are no guidelines: nothing to judge")
        if self.correctness and "correctness" in self.guidelines:
            raise ValueError("guidelines: the name correctness is taken")
        return self

    @property
    def metrics(self) -> tuple[str, ...]:
        """What the judge's opinions are called among the metrics."""
        names = (*(("correctness",) if self.correctness else ()), *self.guidelines)
        return tuple(f"judge.{name}" for name in names)


class EvaluationSettings(Section):
    """What the model is measured on."""

    size: Literal["quick", "full"] = Field(
        default="quick", description="the project's own sets: the quick part or all of it"
    )
    questions: str = Field(default="auto", description="a JSONL, CSV or Parquet file of questions")
    texts: str = Field(default="auto", description="a JSONL file of held-out texts")
    window: int = Field(default=512, ge=32, le=4096, description="tokens scored in one piece")
    task_check: Literal["auto", "text", "json"] = Field(
        default="auto",
        description="when an answer to a row that training set aside is right: the same text, the "
        "same JSON value, or auto: JSON where the row's answer is an object or a list. A row "
        "may have a check of its own, as a question has",
    )
    task_rows: int = Field(
        default=200,
        ge=20,
        le=100_000,
        description="rows that training set aside which are asked at most, chosen by their content",
    )
    reference_answers: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="in size full, whether full precision itself is asked all questions, once per "
        "checkpoint, so that its right answers, speed and memory stand beside the version's. "
        "auto: where it takes at most half of the free memory as a whole, in float32. always: "
        "of a larger one too, layer by layer, which takes long and tells no speed and memory",
    )
    batch: Literal["auto"] | Annotated[int, Field(ge=1, le=64)] = Field(
        default="auto",
        description="questions that a version answers together, as far as memory allows; 1: one at "
        "a time. auto: one at a time, or up to 8 where the model's files have 1 GB or more. A few "
        "are asked one at a time in any case: they tell speed and memory",
    )
    judge: JudgeSettings | None = Field(
        default=None, description="a model that judges the answers; default: none"
    )


class Bound(Section):
    """The bounds that a metric must stay within."""

    min: float | None = None
    max: float | None = None

    @model_validator(mode="after")
    def _has_a_side(self) -> Bound:
        if self.min is None and self.max is None:
            raise ValueError("give min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self


class Margin(Section):
    """By how much a metric may be worse than another model's, or has to be better."""

    by: float | None = Field(default=None, ge=0, description="in the metric's own unit")
    percent: float | None = Field(default=None, ge=0, description="of the other model's value")

    @model_validator(mode="after")
    def _one_of_both(self) -> Margin:
        if (self.by is None) == (self.percent is None):
            raise ValueError("give either by (in the metric's unit) or percent")
        return self


GATED_METRICS = (
    "perplexity",
    "perplexity_ratio",
    "kl_mean",
    "top1_agreement",
    "accuracy",
    "endless_rate",
    "repetition_rate",
    "tokens_per_second",
    "time_to_first_token_s",
    "peak_memory_bytes",
    "size_bytes",
    "task_accuracy",
    "task_loss",
    "task_gain_kept",
)
"""The metrics that a profile may set bounds for."""

TASK_METRICS = ("task_accuracy", "task_loss")
GENERAL_METRICS = ("accuracy", "perplexity", "endless_rate", "repetition_rate")
COMPARED_METRICS = tuple(metric for metric in GATED_METRICS if not metric.startswith("task_"))
"""The metrics that a profile may set margins to the champion for."""


def _default_thresholds() -> dict[str, Bound]:
    """What any version has to keep to whose profile sets no bounds of its own.

    The first three are relative to full precision: plain rounding of a small model stays within
    them (KL 0.41 nats, 70 % of the likeliest tokens, 1.38 times the perplexity), a broken export
    does not. The others refuse what never ends its answers, or goes round in circles.
    """
    return {
        "kl_mean": Bound(max=0.5),
        "top1_agreement": Bound(min=0.65),
        "perplexity_ratio": Bound(max=1.5),
        "endless_rate": Bound(max=0.8),
        "repetition_rate": Bound(max=0.25),
    }


def _default_margins() -> dict[str, Margin]:
    return {"accuracy": Margin(by=0.05), "kl_mean": Margin(percent=10)}


def _default_gains() -> dict[str, Margin]:
    return {"task_accuracy": Margin(by=0)}


def _default_losses() -> dict[str, Margin]:
    return {"accuracy": Margin(by=0.15), "perplexity": Margin(percent=10)}


class TrainedGateSettings(Section):
    """What has to be shown of a fine-tuned version, in place of `gate.champion`."""

    better: dict[str, Margin] = Field(
        default_factory=_default_gains,
        min_length=1,
        description="task_accuracy or task_loss: by how much it has to be better, at least, than "
        "the champion or, where there is none, than the base before training",
    )
    not_worse: dict[str, Margin] = Field(
        default_factory=_default_losses,
        description="accuracy, perplexity, endless_rate or repetition_rate on the general sets: by "
        "how much it may be worse than the champion, and than the base",
    )

    @field_validator("better", "not_worse")
    @classmethod
    def _known_metrics(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        _refuse_unknown(value, TASK_METRICS if info.field_name == "better" else GENERAL_METRICS)
        return value


def _refuse_unknown(metrics: Iterable[str], known: Sequence[str]) -> None:
    """Refuse metrics that are not among the known.

    Raises:
        ValueError: some are not.
    """
    if unknown := sorted(set(metrics) - set(known)):
        raise ValueError(f"unknown metric {', '.join(unknown)}; there are {', '.join(known)}")


class GateSettings(Section):
    """What a version must meet before the alias `champion` moves to it."""

    off: bool = Field(
        default=False,
        description="nothing is checked, and everything that shows a version says that it is not "
        "gated; written short as gate: off",
    )
    thresholds: dict[str, Bound] = Field(
        default_factory=_default_thresholds,
        description="bounds that hold whatever the champion is like; left out, those of "
        "docs/evaluation.md",
    )
    champion: dict[str, Margin] = Field(
        default_factory=_default_margins,
        description="by how much it may be worse than the champion; {} compares nothing. Without "
        "effect for a fine-tuned version",
    )
    trained: TrainedGateSettings = Field(
        default_factory=TrainedGateSettings,
        description="what has to be shown of a fine-tuned version, in place of champion",
    )

    @model_validator(mode="before")
    @classmethod
    def _in_one_word(cls, value: Any) -> Any:
        # YAML reads a bare off as false.
        return {"off": True} if value is False or value == "off" else value

    @model_validator(mode="after")
    def _off_or_something(self) -> GateSettings:
        if self.off and (given := sorted(self.model_fields_set - {"off"})):
            raise ValueError(f"off: true checks nothing; leave out off, or {', '.join(given)}")
        return self

    @field_validator("thresholds", "champion")
    @classmethod
    def _known_metrics(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        # What a judge says of two models is not paired, so it is good for thresholds only.
        if info.field_name == "champion":
            _refuse_unknown(value, COMPARED_METRICS)
        else:
            _refuse_unknown((m for m in value if not m.startswith("judge.")), GATED_METRICS)
        return value
