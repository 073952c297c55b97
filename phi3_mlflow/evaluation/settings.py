"""The profile's sections `evaluation` and `gate`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from phi3_mlflow.core.section import Section


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
    """By how much a metric may be worse than the champion's."""

    by: float | None = Field(default=None, ge=0, description="in the metric's own unit")
    percent: float | None = Field(default=None, ge=0, description="of the champion's value")

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
)
"""The metrics that a profile may set bounds and margins for."""


def _default_margins() -> dict[str, Margin]:
    return {"accuracy": Margin(by=0.05), "kl_mean": Margin(percent=10)}


class GateSettings(Section):
    """What a version must meet before the alias `champion` moves to it."""

    thresholds: dict[str, Bound] = Field(
        default_factory=dict, description="bounds that hold whatever the champion is like"
    )
    champion: dict[str, Margin] = Field(
        default_factory=_default_margins,
        description="by how much it may be worse than the champion; {} compares nothing",
    )

    @field_validator("thresholds", "champion")
    @classmethod
    def _known_metrics(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        # What a judge says of two models is not paired, so it is good for thresholds only.
        by_a_judge = info.field_name == "thresholds"
        unknown = sorted(
            metric
            for metric in value
            if metric not in GATED_METRICS and not (by_a_judge and metric.startswith("judge."))
        )
        if unknown:
            raise ValueError(
                f"unknown metric {', '.join(unknown)}; there are {', '.join(GATED_METRICS)}"
            )
        return value
