"""One metric of two models, compared on the same items: is one better, is it worse by too much?

What the two say to the same questions and about the same texts is compared in pairs. A difference
that chance alone may well have made is neither: it is undecided.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from phi3_mlflow.evaluation.answers import NEEDLE, Answer
from phi3_mlflow.evaluation.metrics import METRICS, formatted, label
from phi3_mlflow.evaluation.statistics import Interval, mcnemar, paired_ratio

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from phi3_mlflow.evaluation.divergence import TextScore
    from phi3_mlflow.evaluation.measurement import Measurement
    from phi3_mlflow.evaluation.settings import Margin

State = Literal["better", "not worse", "undecided", "worse"]
Wanted = Literal["not worse", "better"]
Than = Literal["champion", "base"]

_SIGNIFICANT = 0.05
FEWEST_QUESTIONS = 20
"""Below these, resampling says nothing worth acting on."""

_FEWEST_TEXTS = 6

NAMES: Mapping[Than, str] = {"champion": "champion", "base": "untrained base"}
"""What a version is compared with, for people."""


@dataclass(frozen=True)
class Comparison:
    """One metric compared with another model's.

    Attributes:
        metric: a key of `METRICS`.
        champion: the other model's value.
        found: the version's.
        margin: by how much it may be worse, or has to be better, in the metric's unit.
        worse_by: how much worse it is, negative when it is better; with its 95 % interval.
        state: `worse` is a reason to refuse, `better` one to promote.
        reason: all of it in a sentence.
        than: whose values it is compared with.
        wanted: what is to be shown.
    """

    metric: str
    champion: float | None
    found: float | None
    margin: float | None
    worse_by: float | None
    low: float | None
    high: float | None
    state: State
    reason: str
    than: Than = "champion"
    wanted: Wanted = "not worse"

    @property
    def shown(self) -> bool:
        """Whether what is wanted has been shown."""
        return self.state == "better" or self.state == self.wanted


def compare_metric(
    metric: str,
    margin: Margin,
    found: Measurement,
    other: Measurement,
    than: Than = "champion",
    wanted: Wanted = "not worse",
) -> Comparison:
    """Compare one metric of two models.

    Args:
        metric: a key of `METRICS` that both were measured for.
        margin: by how much it may be worse or, where it has to be better, by how much at least.
        found: of the version.
        other: of the model it is compared with, on the same sets with the same code.
        than: what that model is.
        wanted: what is to be shown.
    """
    mine, theirs = found.metrics.get(metric), other.metrics.get(metric)
    if mine is None or theirs is None:
        who = f"the {NAMES[than]}" if theirs is None else "the version"
        reason = f"{label(metric)}: was not measured of {who}"
        return Comparison(
            metric, theirs, mine, None, None, None, None, "undecided", reason, than, wanted
        )
    allowed = margin.by if margin.by is not None else abs(theirs) * (margin.percent or 0) / 100
    sign = -1.0 if METRICS[metric].better == "higher" else 1.0
    if metric in EXACT:
        by = sign * (mine - theirs)
        worse = Interval(by, by, by)
        # Without noise, but then any byte would count: an improvement has to be worth the name.
        state: State = "worse" if by > allowed else "better" if by < -allowed else "not worse"
        told = ""
    else:
        paired = _PAIRED[metric](metric, found, other)
        if paired is None:
            reason = f"{label(metric)}: too few items in common with the {NAMES[than]} to tell"
            return Comparison(
                metric, theirs, mine, allowed, None, None, None, "undecided", reason, than, wanted
            )
        difference, p_value = paired
        low, high = sorted((sign * difference.low, sign * difference.high))
        worse = Interval(sign * difference.value, low, high)
        state, told = _state(worse, allowed, p_value, wanted)
    limit = "allowed" if wanted == "not worse" else "to be better by more than"
    reason = (
        f"{label(metric)}: {formatted(metric, mine)}, {NAMES[than]} {formatted(metric, theirs)}: "
        f"{_amount(metric, worse)}, {limit} {formatted(metric, allowed)}{told}"
    )
    return Comparison(
        metric, theirs, mine, allowed, worse.value, worse.low, worse.high, state, reason, than,
        wanted,
    )  # fmt: skip


def _state(
    worse: Interval, margin: float, p_value: float | None, wanted: Wanted
) -> tuple[State, str]:
    """What the interval of a difference shows; a McNemar test has to agree where there is one."""
    certain = p_value is None or p_value < _SIGNIFICANT
    told = "" if p_value is None else f" (McNemar p = {p_value:.3g})"
    may_lose, has_to_gain = (margin, 0.0) if wanted == "not worse" else (0.0, margin)
    if worse.low > may_lose and certain:
        return "worse", told
    if worse.high < -has_to_gain and certain:
        return "better", told
    return ("not worse" if worse.high <= may_lose else "undecided"), told


def _amount(metric: str, worse: Interval) -> str:
    word = "worse" if worse.value >= 0 else "better"
    text = f"{word} by {formatted(metric, abs(worse.value))}"
    if worse.low == worse.high:
        return text
    bounds = (worse.low, worse.high) if worse.value >= 0 else (-worse.high, -worse.low)
    low, high = (("-" if v < 0 else "") + formatted(metric, abs(v)) for v in bounds)
    return f"{text} (95 %: {low} to {high} {word})"


Paired = tuple[Interval, float | None] | None


def _questions(measurement: Measurement) -> Sequence[Answer]:
    return [a for a in measurement.answers if not a.category.startswith(NEEDLE)]


def _task(measurement: Measurement) -> Sequence[Answer]:
    return measurement.task_answers


def _pairs(
    before: Sequence[Answer],
    after: Sequence[Answer],
    value: Callable[[Answer], float | None],
) -> tuple[list[float], list[float]]:
    """The values of both models for the questions both were asked: the other's, the version's."""
    theirs = {answer.question_id: answer for answer in before}
    pairs = [(value(theirs[a.question_id]), value(a)) for a in after if a.question_id in theirs]
    whole = [(one, two) for one, two in pairs if one is not None and two is not None]
    return [one for one, _ in whole], [two for _, two in whole]


def _accuracy(answers: Callable[[Measurement], Sequence[Answer]]) -> Callable[..., Paired]:
    def compare(metric: str, found: Measurement, other: Measurement) -> Paired:
        theirs, mine = _pairs(answers(other), answers(found), lambda a: float(a.correct))
        if len(mine) < FEWEST_QUESTIONS:
            return None
        only_theirs = sum(t > m for t, m in zip(theirs, mine, strict=True))
        only_mine = sum(m > t for t, m in zip(theirs, mine, strict=True))
        return paired_ratio(theirs, mine), mcnemar(only_theirs, only_mine)

    return compare


def _per_answer(value: Callable[[Answer], float | None]) -> Callable[..., Paired]:
    def compare(metric: str, found: Measurement, other: Measurement) -> Paired:
        theirs, mine = _pairs(_questions(other), _questions(found), value)
        return None if len(mine) < FEWEST_QUESTIONS else (paired_ratio(theirs, mine), None)

    return compare


def _texts(value: Callable[[TextScore], float]) -> Callable[..., Paired]:
    def compare(metric: str, found: Measurement, other: Measurement) -> Paired:
        before = {score.text_id: score for score in other.scores}
        pairs = [(before[s.text_id], s) for s in found.scores if s.text_id in before]
        if len(pairs) < _FEWEST_TEXTS:
            return None
        difference = paired_ratio(
            [value(one) for one, _ in pairs],
            [value(two) for _, two in pairs],
            [score.places for _, score in pairs],
        )
        return _as_perplexity(metric, difference, pairs), None

    return compare


def _as_perplexity(
    metric: str, nll: Interval, pairs: Sequence[tuple[TextScore, TextScore]]
) -> Interval:
    """A difference of mean NLL as one of perplexity (or of its ratio to full precision)."""
    if metric not in ("perplexity", "perplexity_ratio"):
        return nll
    places = sum(one.places for one, _ in pairs)
    base = sum(one.candidate_nll for one, _ in pairs) / places
    if metric == "perplexity_ratio":
        base -= sum(one.reference_nll for one, _ in pairs) / places
    low, value, high = (math.exp(base + d) - math.exp(base) for d in (nll.low, nll.value, nll.high))
    return Interval(value, low, high)


def _task_loss(metric: str, found: Measurement, other: Measurement) -> Paired:
    before = {score.row_id: score for score in other.task_scores}
    pairs = [(before[s.row_id], s) for s in found.task_scores if s.row_id in before]
    if len(pairs) < FEWEST_QUESTIONS:
        return None
    sums = [one.nll for one, _ in pairs], [two.nll for _, two in pairs]
    return paired_ratio(*sums, [score.tokens for _, score in pairs]), None


def _tells(answer: Answer) -> bool:
    """Whether an answer's times are those of the model alone, for a single request."""
    return answer.alone and not answer.disturbed


EXACT = ("size_bytes", "peak_memory_bytes")
TIMED = ("tokens_per_second", "time_to_first_token_s")
"""Comparable only when both models were measured one after the other."""

_PAIRED: Mapping[str, Callable[[str, Measurement, Measurement], Paired]] = {
    "accuracy": _accuracy(_questions),
    "task_accuracy": _accuracy(_task),
    "task_loss": _task_loss,
    "perplexity": _texts(lambda score: score.candidate_nll),
    "perplexity_ratio": _texts(lambda score: score.candidate_nll),
    "kl_mean": _texts(lambda score: score.kl),
    "top1_agreement": _texts(lambda score: float(score.agreements)),
    "tokens_per_second": _per_answer(lambda a: a.rate if _tells(a) else None),
    "time_to_first_token_s": _per_answer(lambda a: a.first_seconds if _tells(a) else None),
    "endless_rate": _per_answer(lambda a: float(a.finish_reason == "length")),
    "repetition_rate": _per_answer(lambda a: float(a.repeats)),
}
