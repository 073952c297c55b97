"""What every metric of an evaluation is called, what it means, and how it is written.

The model card, the console and the report all take their words from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Better = Literal["higher", "lower", "neither"]


def _share(value: float) -> str:
    return f"{value:.1%}"


def _megabytes(value: float) -> str:
    if value >= 1e9:
        return f"{value / 1e9:.2f} GB"
    return f"{value / 1e6:.0f} MB" if value >= 1e6 else f"{value / 1e3:.0f} kB"


def _seconds(value: float) -> str:
    return f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.1f} s"


def _nats(value: float) -> str:
    return f"{value:.3f} nats"


def _rate(value: float) -> str:
    return f"{value:.0f} tokens/s" if value >= 10 else f"{value:.1f} tokens/s"


def _two(value: float) -> str:
    return f"{value:.2f}"


def _three(value: float) -> str:
    return f"{value:.3f}"


def _count(value: float) -> str:
    return f"{value:,.0f}"


@dataclass(frozen=True)
class Metric:
    """One metric, for people.

    Attributes:
        label: what it is called, in lower case.
        write: the value with its unit.
        better: in which direction it improves.
        means: one sentence on what is measured.
    """

    label: str
    write: Callable[[float], str]
    better: Better
    means: str


METRICS: Mapping[str, Metric] = {
    "task_accuracy": Metric(
        "task done right", _share, "higher", "Share of the rows set aside that are answered right."
    ),
    "task_loss": Metric(
        "loss on the task", _nats, "lower", "Per token of the answers in the rows set aside."
    ),
    "task_gain_kept": Metric(
        "gain of training kept",
        _share,
        "higher",
        "Of what training gained at the task in full precision, the share that int4 has left.",
    ),
    "accuracy": Metric(
        "questions answered right", _share, "higher", "Share of the questions whose answer passes."
    ),
    "perplexity": Metric(
        "perplexity", _two, "lower", "How surprised the model is by held-out text."
    ),
    "perplexity_reference": Metric(
        "perplexity, full precision", _two, "neither", "The same of the full-precision reference."
    ),
    "perplexity_ratio": Metric(
        "perplexity / full precision", _three, "lower", "1 would be no loss at all."
    ),
    "kl_mean": Metric(
        "KL divergence from full precision",
        _nats,
        "lower",
        "How far the next-token probabilities moved, averaged over held-out text.",
    ),
    "top1_agreement": Metric(
        "same likeliest token",
        _share,
        "higher",
        "How often the model and full precision would say the same next.",
    ),
    "tokens_per_second": Metric(
        "speed, median", _rate, "higher", "Tokens of an answer over its whole time."
    ),
    "tokens_per_second_p95": Metric(
        "speed, slowest 5 %", _rate, "higher", "95 of 100 answers are at least this quick."
    ),
    "tokens_per_second_spread": Metric(
        "speed, spread over the questions",
        _share,
        "lower",
        "How far the middle half of the speeds reaches, as a share of the median.",
    ),
    "other_load": Metric(
        "processor used by other programs",
        _share,
        "neither",
        "While speeds and times were measured; above 10 % they say little about the model.",
    ),
    "time_to_first_token_s": Metric(
        "time to first token, median", _seconds, "lower", "From the request to the first piece."
    ),
    "time_to_first_token_p95_s": Metric(
        "time to first token, slowest 5 %", _seconds, "lower", "95 of 100 answers begin by then."
    ),
    "latency_s": Metric("time of an answer, median", _seconds, "lower", "Request to last token."),
    "latency_p95_s": Metric(
        "time of an answer, slowest 5 %", _seconds, "lower", "95 of 100 are done by then."
    ),
    "timed_answers": Metric(
        "answers that tell speed and time",
        _count,
        "neither",
        "Asked one at a time, while no other program computed.",
    ),
    "peak_memory_bytes": Metric(
        "peak memory", _megabytes, "lower", "Of a process that does nothing but serve the model."
    ),
    "size_bytes": Metric("size on disk", _megabytes, "lower", "The files of the model."),
    "load_time_s": Metric("time to load", _seconds, "lower", "Until it could answer."),
    "repetition_rate": Metric(
        "answers that repeat themselves", _share, "lower", "Caught in a loop of the same words."
    ),
    "endless_rate": Metric(
        "answers cut off", _share, "lower", "Still going at the question's limit of tokens."
    ),
    "needle_accuracy": Metric(
        "needles found in long prompts", _share, "higher", "One sentence hidden in a long text."
    ),
    "scored_tokens": Metric("tokens scored", _count, "neither", "Held-out text."),
}
"""In the order in which they are shown."""

HEADLINE = (
    "task_accuracy",
    "task_gain_kept",
    "accuracy",
    "perplexity",
    "perplexity_reference",
    "kl_mean",
    "top1_agreement",
    "tokens_per_second",
    "time_to_first_token_s",
    "peak_memory_bytes",
    "size_bytes",
)
"""What a version's tags, its card and the console show."""


BASE, FULL = "_base", "_full"
"""What follows the name of a metric that was measured of the base before training, and of the
fine-tuned checkpoint in full precision."""


def formatted(metric: str, value: float) -> str:
    """A value with its unit; what is not known is written with four digits."""
    metric = metric.removesuffix(BASE).removesuffix(FULL)
    if metric in METRICS:
        return METRICS[metric].write(value)
    return _share(value) if metric.startswith(("accuracy.", "judge.")) else f"{value:.4g}"


def label(metric: str) -> str:
    """What a metric is called: `accuracy.facts` is "facts, answered right"."""
    if metric in METRICS:
        return METRICS[metric].label
    head, _, category = metric.partition(".")
    if head == "accuracy" and category:
        return f"{category.replace('_', ' ')}, answered right"
    if head == "judge" and category:
        return f"{category.replace('_', ' ')}, says the judge"
    return metric.replace("_", " ")


def headline(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """The headline metrics among some, as pairs of label and text.

    The reference's perplexity is shown with the model's own.
    """
    lines = []
    for metric in HEADLINE:
        if metric not in metrics or metric == "perplexity_reference":
            continue
        text = formatted(metric, metrics[metric])
        if metric == "perplexity" and (full := metrics.get("perplexity_reference")):
            text += f" (full precision: {formatted(metric, full)})"
        lines.append((label(metric), text))
    return lines
