"""Choose among quantizations by what they were measured to be.

The choice is a pure function of measurements: who builds and measures a candidate, and where that
is logged, is the caller's business.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from phi3_mlflow.core.errors import ProjectError, UserError, problem_list

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from phi3_mlflow.quantization.search_settings import Budget
    from phi3_mlflow.quantization.settings import QuantizationSettings


@dataclass(frozen=True)
class CandidateMetrics:
    """What was measured of one candidate, against the full-precision model on held-out text.

    Attributes:
        kl_mean: mean divergence of the next token's distribution, nats; less is better.
        top1_agreement: share of places where both think the same token likeliest.
        perplexity: of the candidate.
        data_bytes: length of `model.onnx.data`.
        tokens_per_second: decode speed.
    """

    kl_mean: float
    top1_agreement: float
    perplexity: float
    data_bytes: int
    tokens_per_second: float


@dataclass(frozen=True)
class Ranked:
    """A candidate in the ranking.

    Attributes:
        name: its name.
        settings: its settings.
        measurement: None when it could not be built or measured.
        reasons: why it is out: beyond the budget, or what failed; empty when it is in.
        on_front: whether no other is at least as good in size and divergence and better in one.
    """

    name: str
    settings: QuantizationSettings
    measurement: CandidateMetrics | None
    reasons: tuple[str, ...]
    on_front: bool = False


@dataclass(frozen=True)
class Ranking:
    """All candidates, best first: those within the budget, those beyond it, those that failed."""

    candidates: tuple[Ranked, ...]

    @property
    def best(self) -> Ranked:
        """The best candidate within the budget.

        Raises:
            UserError: there is none; the message says what each one lacks.
        """
        first = self.candidates[0]
        if first.reasons:
            problems = [f"{c.name}: {'; '.join(c.reasons)}" for c in self.candidates]
            raise UserError(
                problem_list(
                    "no candidate keeps to the budget",
                    problems,
                    "Widen the budget or list other candidates.",
                )
            )
        return first


def search(
    candidates: Mapping[str, QuantizationSettings],
    measure: Callable[[str, QuantizationSettings], CandidateMetrics],
    budget: Budget,
) -> Ranking:
    """Measure every candidate and rank them.

    Within the budget the least divergence wins; equal ones are told apart by size, then by name. A
    candidate whose measurement raises a `ProjectError` is ranked last with the reason, so that one
    impossible candidate does not cost the others their results.

    Args:
        candidates: settings by name, in the order of measuring.
        measure: builds and measures one.
        budget: what they must keep to.

    Raises:
        UserError: there are no candidates.
    """
    if not candidates:
        raise UserError("the search has no candidates; list some in the profile")
    ranked = [_measured(name, settings, measure, budget) for name, settings in candidates.items()]
    ranked = [replace(one, on_front=_on_front(one, ranked)) for one in ranked]
    return Ranking(tuple(sorted(ranked, key=_order)))


def _measured(
    name: str,
    settings: QuantizationSettings,
    measure: Callable[[str, QuantizationSettings], CandidateMetrics],
    budget: Budget,
) -> Ranked:
    try:
        found = measure(name, settings)
    except ProjectError as error:
        return Ranked(name, settings, None, (str(error),))
    return Ranked(name, settings, found, tuple(excess(found, budget)))


def excess(found: CandidateMetrics, budget: Budget) -> list[str]:
    """What a candidate fails in a budget.

    Returns:
        A sentence for each limit, with by how much it is missed; empty when the candidate fits.
    """
    reasons = []
    if budget.data_bytes is not None and found.data_bytes > budget.data_bytes:
        over = found.data_bytes - budget.data_bytes
        reasons.append(f"{over:,} bytes over the budget of {budget.data_bytes:,}")
    slow = budget.tokens_per_second
    if slow is not None and found.tokens_per_second < slow:
        reasons.append(f"{found.tokens_per_second:.1f} tokens/s, at least {slow:g} wanted")
    if budget.kl_mean is not None and found.kl_mean > budget.kl_mean:
        reasons.append(f"divergence {found.kl_mean:.4f}, at most {budget.kl_mean:g} wanted")
    agree = budget.top1_agreement
    if agree is not None and found.top1_agreement < agree:
        reasons.append(f"top-1 agreement {found.top1_agreement:.3f}, at least {agree:g} wanted")
    return reasons


def _on_front(one: Ranked, others: list[Ranked]) -> bool:
    mine = one.measurement
    if mine is None:
        return False
    return not any(
        other.data_bytes <= mine.data_bytes
        and other.kl_mean <= mine.kl_mean
        and (other.data_bytes, other.kl_mean) != (mine.data_bytes, mine.kl_mean)
        for other in (ranked.measurement for ranked in others)
        if other is not None
    )


def _order(one: Ranked) -> tuple[int, float, int, str]:
    found = one.measurement
    if found is None:
        return 2, 0.0, 0, one.name
    return (1 if one.reasons else 0), found.kl_mean, found.data_bytes, one.name
