"""The gate: whether what was measured is good enough, and whether it is better than the champion.

Questions that are decided apart:

- Thresholds: is the version within the bounds that the profile sets, whatever else there is?
- The champion: on the same items, does anything show that the version is worse by more than the
  profile allows? Does anything show that it is better?

Of a fine-tuned version more is asked, because it was changed on purpose: it has to be shown to be
better at its task, and shown not to be worse by more than allowed at everything else. It is
compared with the champion and, so that small losses do not add up from one champion to the next,
with the base before training.

The comparisons are statistical: what two models say to the same questions and about the same texts,
paired. A difference that chance alone may well have made is neither a reason to refuse nor a reason
to move the alias.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from phi3_mlflow.evaluation.load import SPEEDS, unsound
from phi3_mlflow.evaluation.metrics import label
from phi3_mlflow.evaluation.paired import NAMES, Comparison, compare_metric
from phi3_mlflow.tracking.registry import FAILED, NOT_GATED, PASSED

if TYPE_CHECKING:
    from collections.abc import Mapping

    from phi3_mlflow.evaluation.measurement import Measurement
    from phi3_mlflow.evaluation.settings import Bound, Margin, TrainedGateSettings

Decision = Literal["promote", "keep", "refuse"]


@dataclass(frozen=True)
class ThresholdResult:
    """One threshold and what was found.

    Attributes:
        metric: a key of `METRICS`.
        bound: what is wanted, as text.
        found: what was measured; None where it was not.
        passed: whether it speaks for the version, or at least not against it.
        reason: all of it in a sentence.
        unjudged: it is not met, and was measured in a way that says little about the version.
    """

    metric: str
    bound: str
    found: float | None
    passed: bool
    reason: str
    unjudged: bool = False


@dataclass(frozen=True)
class Verdict:
    """What the gate says of one version.

    Attributes:
        checks: the thresholds.
        comparisons: with the champion and, of a fine-tuned version, with its base.
        against: the champion it was compared with, as `models:/NAME/NUMBER`.
        note: what decided, when it was neither a threshold nor a comparison.
        replaces: why the champion, which is the same model, cannot stay; empty where it can.
        trained: the version is a fine-tuned one, so that everything that is wanted has to be shown.
        off: the profile switches the gate off.
    """

    checks: tuple[ThresholdResult, ...]
    comparisons: tuple[Comparison, ...] = ()
    against: str | None = None
    note: str = ""
    replaces: str = ""
    trained: bool = False
    off: bool = False

    @property
    def gated(self) -> bool:
        """Whether anything was checked at all."""
        return bool(self.checks or self.comparisons)

    @property
    def gate(self) -> str:
        """The verdict in a word, as the version's tag `gate` has it."""
        if not self.passed:
            return FAILED
        return PASSED if self.gated else NOT_GATED

    @property
    def passed(self) -> bool:
        """Whether nothing speaks against the version."""
        return all(c.passed for c in self.checks) and not self.against_it

    @property
    def decision(self) -> Decision:
        """What becomes of the alias."""
        if not self.passed:
            return "refuse"
        if self.replaces:
            return "promote"
        if self.note:
            return "keep"
        if self.trained:
            return "keep" if self.not_shown else "promote"
        if self.against is None:
            return "promote"
        states = [c.state for c in self.comparisons]
        return "promote" if "better" in states or "undecided" not in states else "keep"

    @property
    def not_shown(self) -> list[Comparison]:
        """The comparisons that do not show what is wanted."""
        return [comparison for comparison in self.comparisons if not comparison.shown]

    @property
    def against_it(self) -> list[Comparison]:
        """The comparisons that are a reason to refuse."""
        if self.trained and self.against is None:
            # There is no champion that could stay: an unproven version would answer everybody.
            return self.not_shown
        return [c for c in self.comparisons if c.state == "worse"]

    @property
    def reasons(self) -> list[str]:
        """One line for each thing that speaks against the version."""
        failed = [check.reason for check in self.checks if not check.passed]
        return failed + [_said(c) for c in self.against_it]

    @property
    def why(self) -> str:
        """The decision in one sentence, and what was not judged."""
        return "; ".join([self._decided, *(c.reason for c in self.checks if c.unjudged)])

    @property
    def _decided(self) -> str:
        if self.decision == "refuse":
            return "; ".join(self.reasons)
        if self.replaces:
            return self.replaces
        if self.note:
            return self.note if self.gated else f"{NOT_GATED}; {self.note}"
        if not self.gated:
            switch = "the profile switches the gate off" if self.off else "the profile asks nothing"
            return f"{NOT_GATED}: {switch}, so nothing was checked"
        if self.trained:
            return self._why_trained
        if self.against is None:
            return "all thresholds are met, and there was no champion"
        better = [label(c.metric) for c in self.comparisons if c.state == "better"]
        if better:
            names = ", ".join(better)
            return f"better than the champion in: {names}; not worse in anything that counts"
        if self.decision == "promote":
            return "all thresholds are met, and it is not worse than the champion"
        return "nothing shows that it is better than the champion, or as good; measure more to tell"

    @property
    def _why_trained(self) -> str:
        if self.not_shown:
            return "; ".join(map(_said, self.not_shown))
        gains = [c for c in self.comparisons if c.wanted == "better"]
        names = ", ".join(label(c.metric) for c in gains)
        than = NAMES[gains[0].than]
        losses = sorted({label(c.metric) for c in self.comparisons if c.wanted == "not worse"})
        kept = f"; shown not to be worse than allowed in: {', '.join(losses)}" if losses else ""
        return f"better than the {than} in: {names}{kept}"

    def to_dict(self) -> dict[str, Any]:
        """The verdict as `verdict.json` holds it."""
        return {
            "gate": self.gate,
            "passed": self.passed,
            "decision": self.decision,
            "why": self.why,
            "against": self.against,
            "note": self.note,
            "reasons": self.reasons,
            "trained": self.trained,
            "checks": [asdict(check) for check in self.checks],
            "comparisons": [asdict(comparison) for comparison in self.comparisons],
        }


def check_thresholds(metrics: Mapping[str, float], thresholds: Mapping[str, Bound]) -> Verdict:
    """Compare metrics with thresholds.

    A metric that has a threshold but was not measured fails: a gate that cannot see must not open.
    `mlflow.validate_evaluation_results` says the same (a test compares them), but takes one bound
    per metric, and raises where a report wants every check with its numbers.

    Speeds that were measured beside other programs are judged in one direction: those that keep to
    a bound all the same keep to it, others are not judged, and the verdict says so.
    """
    checks = []
    disturbed = unsound(metrics)
    for metric, bound in sorted(thresholds.items()):
        found = metrics.get(metric)
        if bound.min is not None:
            checks.append(_check(metric, "min", bound.min, found))
        if bound.max is not None:
            checks.append(_check(metric, "max", bound.max, found))
    if disturbed:
        checks = [_unjudged(check, disturbed) for check in checks]
    return Verdict(tuple(checks))


def _unjudged(check: ThresholdResult, disturbed: str) -> ThresholdResult:
    """A check of a disturbed speed that failed, without its failure."""
    if check.passed or check.found is None or check.metric not in SPEEDS:
        return check
    reason = f"{check.metric} is not judged: {check.found:.4g}, {disturbed}; wanted {check.bound}"
    return replace(check, passed=True, unjudged=True, reason=reason)


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


def trained_verdict(
    verdict: Verdict,
    found: Measurement,
    base: Measurement,
    champion: Measurement | None,
    margins: TrainedGateSettings,
    champion_uri: str | None,
) -> Verdict:
    """Add to a verdict what has to be shown of a fine-tuned version.

    Args:
        verdict: on the thresholds.
        found: of the version.
        base: of the checkpoint before training, in full precision.
        champion: of the champion, on the same rows; None where there is none.
        margins: what has to be shown.
        champion_uri: for the record.
    """
    comparisons = []
    for metric, margin in sorted(margins.better.items()):
        if champion is not None:
            made = compare_metric(metric, margin, found, champion, "champion", "better")
        else:
            made = compare_metric(metric, margin, found, base, "base", "better")
        comparisons.append(made)
    for metric, margin in sorted(margins.not_worse.items()):
        if champion is not None:
            comparisons.append(compare_metric(metric, margin, found, champion))
        comparisons.append(compare_metric(metric, margin, found, base, "base"))
    return replace(verdict, comparisons=tuple(comparisons), against=champion_uri, trained=True)


def _said(comparison: Comparison) -> str:
    """A comparison that does not show what is wanted, as a reason."""
    if comparison.state == "worse":
        return comparison.reason
    wanted = "better" if comparison.wanted == "better" else "within what is allowed"
    return f"not shown to be {wanted}: {comparison.reason}"
