"""The gate: whether what was measured is good enough, and by how much it is not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from phi3_mlflow.profiles import Bound


@dataclass(frozen=True)
class Check:
    """One threshold and what was found."""

    metric: str
    bound: str
    found: float | None
    passed: bool
    reason: str


@dataclass(frozen=True)
class Verdict:
    """All checks of one version; it passes when every one does."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def reasons(self) -> list[str]:
        """One line a failed check."""
        return [check.reason for check in self.checks if not check.passed]

    def to_dict(self) -> dict[str, Any]:
        return {"passed": self.passed, "checks": [asdict(check) for check in self.checks]}


def judge(metrics: Mapping[str, float], thresholds: Mapping[str, Bound]) -> Verdict:
    """Compare metrics with thresholds.

    A metric that has a threshold but was not measured fails: a gate that cannot see must not open.
    """
    checks = []
    for metric, bound in sorted(thresholds.items()):
        found = metrics.get(metric)
        if bound.min is not None:
            checks.append(_check(metric, "min", bound.min, found))
        if bound.max is not None:
            checks.append(_check(metric, "max", bound.max, found))
    return Verdict(tuple(checks))


def _check(metric: str, side: str, limit: float, found: float | None) -> Check:
    sign = ">=" if side == "min" else "<="
    bound = f"{sign} {limit:g}"
    if found is None or found != found:
        return Check(metric, bound, None, False, f"{metric} was not measured; wanted {bound}")
    passed = found >= limit if side == "min" else found <= limit
    if passed:
        return Check(metric, bound, found, True, f"{metric} {found:.4g} {bound}")
    direction = "below" if side == "min" else "above"
    reason = f"{metric} is {found:.4g}, {abs(found - limit):.4g} {direction} the {side} {limit:g}"
    return Check(metric, bound, found, False, reason)
