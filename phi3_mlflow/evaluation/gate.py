"""The gate: whether what was measured is good enough, and whether it is better than the champion.

Two questions, decided apart:

- Thresholds: is the version within the bounds that the profile sets, whatever else there is?
- The champion: on the same items, does anything show that the version is worse by more than the
  profile allows? Does anything show that it is better?

The comparison with the champion is statistical: what the two say to the same questions and about
the same texts, paired. A difference that chance alone may well have made is neither a reason to
refuse nor a reason to move the alias.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from phi3_mlflow.evaluation.answers import NEEDLE, Answer
from phi3_mlflow.evaluation.metrics import METRICS, formatted, label
from phi3_mlflow.evaluation.statistics import Interval, mcnemar, paired_ratio

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from phi3_mlflow.evaluation.divergence import TextScore
    from phi3_mlflow.evaluation.measurement import Measurement
    from phi3_mlflow.evaluation.settings import Bound, Margin

Decision = Literal["promote", "keep", "refuse"]
State = Literal["better", "not worse", "undecided", "worse"]

_SIGNIFICANT = 0.05
_FEWEST_QUESTIONS = 20  # below these, resampling says nothing worth acting on
_FEWEST_TEXTS = 6


@dataclass(frozen=True)
class ThresholdResult:
    """One threshold and what was found."""

    metric: str
    bound: str
    found: float | None
    passed: bool
    reason: str


@dataclass(frozen=True)
class Comparison:
    """One metric compared with the champion's.

    Attributes:
        margin: by how much it may be worse, in the metric's unit.
        worse_by: how much worse it is, negative when it is better; with its 95 % interval.
        state: `worse` is a reason to refuse, `better` one to promote.
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


@dataclass(frozen=True)
class Verdict:
    """What the gate says of one version.

    Attributes:
        checks: the thresholds.
        comparisons: with the champion, none when there is none.
        against: the champion it was compared with, as `models:/NAME/NUMBER`.
        note: what decided, when it was neither a threshold nor a comparison.
    """

    checks: tuple[ThresholdResult, ...]
    comparisons: tuple[Comparison, ...] = ()
    against: str | None = None
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether nothing speaks against the version."""
        return all(c.passed for c in self.checks) and all(
            c.state != "worse" for c in self.comparisons
        )

    @property
    def decision(self) -> Decision:
        """What becomes of the alias."""
        if not self.passed:
            return "refuse"
        if self.against is None:
            return "promote"
        if self.note:
            return "keep"
        states = [c.state for c in self.comparisons]
        return "promote" if "better" in states or "undecided" not in states else "keep"

    @property
    def reasons(self) -> list[str]:
        """One line for each thing that speaks against the version."""
        failed = [check.reason for check in self.checks if not check.passed]
        return failed + [c.reason for c in self.comparisons if c.state == "worse"]

    @property
    def why(self) -> str:
        """The decision in one sentence."""
        if self.decision == "refuse":
            return "; ".join(self.reasons)
        if self.note:
            return self.note
        if self.against is None:
            return "all thresholds are met, and there was no champion"
        better = [label(c.metric) for c in self.comparisons if c.state == "better"]
        if better:
            names = ", ".join(better)
            return f"better than the champion in: {names}; not worse in anything that counts"
        if self.decision == "promote":
            return "all thresholds are met, and it is not worse than the champion"
        return "nothing shows that it is better than the champion, or as good; measure more to tell"

    def to_dict(self) -> dict[str, Any]:
        """The verdict as `verdict.json` holds it."""
        return {
            "passed": self.passed,
            "decision": self.decision,
            "why": self.why,
            "against": self.against,
            "note": self.note,
            "checks": [asdict(check) for check in self.checks],
            "comparisons": [asdict(comparison) for comparison in self.comparisons],
        }


def check_thresholds(metrics: Mapping[str, float], thresholds: Mapping[str, Bound]) -> Verdict:
    """Compare metrics with thresholds.

    A metric that has a threshold but was not measured fails: a gate that cannot see must not open.
    `mlflow.validate_evaluation_results` says the same (a test compares them), but takes one bound
    per metric, and raises where a report wants every check with its numbers.
    """
    checks = []
    for metric, bound in sorted(thresholds.items()):
        found = metrics.get(metric)
        if bound.min is not None:
            checks.append(_check(metric, "min", bound.min, found))
        if bound.max is not None:
            checks.append(_check(metric, "max", bound.max, found))
    return Verdict(tuple(checks))


def _check(metric: str, side: str, limit: float, found: float | None) -> ThresholdResult:
    sign = ">=" if side == "min" else "<="
    bound = f"{sign} {limit:g}"
    if found is None or found != found:
        return ThresholdResult(
            metric, bound, None, False, f"{metric} was not measured; wanted {bound}"
        )
    passed = found >= limit if side == "min" else found <= limit
    if passed:
        return ThresholdResult(metric, bound, found, True, f"{metric} {found:.4g} {bound}")
    direction = "below" if side == "min" else "above"
    reason = f"{metric} is {found:.4g}, {abs(found - limit):.4g} {direction} the {side} {limit:g}"
    return ThresholdResult(metric, bound, found, False, reason)


def against_champion(
    verdict: Verdict,
    found: Measurement,
    champion: Measurement,
    margins: Mapping[str, Margin],
    champion_uri: str,
) -> Verdict:
    """Add the comparison with the champion to a verdict.

    Args:
        verdict: on the thresholds.
        found: of the version.
        champion: of the champion, measured on the same sets with the same code.
        margins: by how much each metric may be worse.
        champion_uri: for the record.
    """
    comparisons = [
        compare_metric(metric, margin, found, champion)
        for metric, margin in sorted(margins.items())
    ]
    return replace(verdict, comparisons=tuple(comparisons), against=champion_uri)


def compare_metric(
    metric: str, margin: Margin, found: Measurement, champion: Measurement
) -> Comparison:
    """Compare one metric of two models."""
    mine, theirs = found.metrics.get(metric), champion.metrics.get(metric)
    if mine is None or theirs is None:
        who = "the champion" if theirs is None else "the version"
        reason = f"{metric} was not measured of {who}"
        return Comparison(metric, theirs, mine, None, None, None, None, "undecided", reason)
    allowed = margin.by if margin.by is not None else abs(theirs) * (margin.percent or 0) / 100
    sign = -1.0 if METRICS[metric].better == "higher" else 1.0
    if metric in EXACT:
        worse = Interval(sign * (mine - theirs), sign * (mine - theirs), sign * (mine - theirs))
        # Without noise, but then any byte would count: an improvement has to be worth the name.
        state: State = "worse" if worse.value > allowed else "not worse"
        if worse.value < -allowed:
            state = "better"
        told = ""
    else:
        paired = _PAIRED[metric](metric, found, champion)
        if paired is None:
            reason = f"{metric}: too few items in common to tell"
            return Comparison(metric, theirs, mine, allowed, None, None, None, "undecided", reason)
        difference, p_value = paired
        low, high = sorted((sign * difference.low, sign * difference.high))
        worse = Interval(sign * difference.value, low, high)
        state, told = _state(worse, allowed, p_value)
    reason = (
        f"{label(metric)}: {formatted(metric, mine)}, champion {formatted(metric, theirs)}: "
        f"{_amount(metric, worse)}, allowed {formatted(metric, allowed)}{told}"
    )
    return Comparison(
        metric, theirs, mine, allowed, worse.value, worse.low, worse.high, state, reason
    )


def _state(worse: Interval, allowed: float, p_value: float | None) -> tuple[State, str]:
    certain = p_value is None or p_value < _SIGNIFICANT
    told = "" if p_value is None else f" (McNemar p = {p_value:.3g})"
    if worse.low > allowed and certain:
        return "worse", told
    if worse.high < 0 and certain:
        return "better", told
    return ("not worse" if worse.high <= allowed else "undecided"), told


def _amount(metric: str, worse: Interval) -> str:
    word = "worse" if worse.value >= 0 else "better"
    text = f"{word} by {formatted(metric, abs(worse.value))}"
    if worse.low == worse.high:
        return text
    low, high = (
        ("-" if v < 0 else "") + formatted(metric, abs(v)) for v in (worse.low, worse.high)
    )
    return f"{text} (95 %: {low} to {high} worse)"


Paired = tuple[Interval, float | None] | None


def _by_question(
    found: Measurement, champion: Measurement, value: Callable[[Answer], float | None]
) -> tuple[list[float], list[float]]:
    """The values of both models for the questions both were asked: champion's, version's."""
    before = {a.question_id: a for a in champion.answers if not a.category.startswith(NEEDLE)}
    pairs = [
        (value(before[a.question_id]), value(a)) for a in found.answers if a.question_id in before
    ]
    whole = [(one, two) for one, two in pairs if one is not None and two is not None]
    return [one for one, _ in whole], [two for _, two in whole]


def _accuracy(metric: str, found: Measurement, champion: Measurement) -> Paired:
    theirs, mine = _by_question(found, champion, lambda a: float(a.correct))
    if len(mine) < _FEWEST_QUESTIONS:
        return None
    only_theirs = sum(t > m for t, m in zip(theirs, mine, strict=True))
    only_mine = sum(m > t for t, m in zip(theirs, mine, strict=True))
    return paired_ratio(theirs, mine), mcnemar(only_theirs, only_mine)


def _timing(value: Callable[[Answer], float | None]) -> Callable[..., Paired]:
    def compare(metric: str, found: Measurement, champion: Measurement) -> Paired:
        theirs, mine = _by_question(found, champion, value)
        return None if len(mine) < _FEWEST_QUESTIONS else (paired_ratio(theirs, mine), None)

    return compare


def _texts(value: Callable[[TextScore], float]) -> Callable[..., Paired]:
    def compare(metric: str, found: Measurement, champion: Measurement) -> Paired:
        before = {score.text_id: score for score in champion.scores}
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


EXACT = ("size_bytes", "peak_memory_bytes")
TIMED = ("tokens_per_second", "time_to_first_token_s")
"""Comparable only when both models were measured one after the other."""

_PAIRED: Mapping[str, Callable[[str, Measurement, Measurement], Paired]] = {
    "accuracy": _accuracy,
    "perplexity": _texts(lambda score: score.candidate_nll),
    "perplexity_ratio": _texts(lambda score: score.candidate_nll),
    "kl_mean": _texts(lambda score: score.kl),
    "top1_agreement": _texts(lambda score: float(score.agreements)),
    "tokens_per_second": _timing(lambda a: a.rate),
    "time_to_first_token_s": _timing(lambda a: a.first_seconds),
    "endless_rate": _timing(lambda a: float(a.finish_reason == "length")),
    "repetition_rate": _timing(lambda a: float(a.repeats)),
}
