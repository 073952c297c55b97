"""What a version has over full precision, and what that cost: a sentence and a few figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from phi3_mlflow.evaluation.load import OTHER_LOAD, unsound
from phi3_mlflow.evaluation.metrics import FULL, formatted, label

if TYPE_CHECKING:
    from collections.abc import Mapping

_SHOWN = ("size_bytes", "peak_memory_bytes", "tokens_per_second", "accuracy")
_NOT_MEASURED = "not measured"
_ALIKE = 1.05  # of a ratio that is not worth a word


@dataclass(frozen=True)
class BoughtRow:
    """One figure of a version beside full precision's, as text.

    Attributes:
        label: what it is called.
        value: of the version.
        full: full precision's, or that it was not measured.
        compared: the one over the other, in words; empty where one is not known.
    """

    label: str
    value: str
    full: str
    compared: str


@dataclass(frozen=True)
class Bought:
    """What a version has over full precision.

    Attributes:
        sentence: all of it, for somebody who reads nothing else.
        rows: the figures.
        missing: what was not measured of full precision, and how it would be; empty when all was.
    """

    sentence: str
    rows: tuple[BoughtRow, ...]
    missing: str


def bought(metrics: Mapping[str, float]) -> Bought:
    """Set a version beside full precision.

    Args:
        metrics: of the version; those of full precision end in `FULL`, as far as they are known.
    """
    rows, missing = [], []
    said: dict[str, str] = {}
    for metric in _SHOWN:
        if metric not in metrics:
            continue
        mine, full = metrics[metric], metrics.get(f"{metric}{FULL}")
        compared = "" if full is None else _compared(metric, mine, full)
        if compared and metric == "tokens_per_second" and (why := _disturbed(metrics)):
            compared = f"not compared: {why}"
        elif compared:
            said[metric] = compared
        if full is None:
            missing.append(label(metric))
        shown = _NOT_MEASURED if full is None else formatted(metric, full)
        rows.append(BoughtRow(label(metric), formatted(metric, mine), shown, compared))
    return Bought(_sentence(metrics, said), tuple(rows), _missing(missing))


def _disturbed(metrics: Mapping[str, float]) -> str:
    """Why speeds are not compared; empty where both are sound."""
    if why := unsound(metrics):
        return why
    full = {OTHER_LOAD: metrics.get(f"{OTHER_LOAD}{FULL}", 0.0)}
    return f"full precision was {unsound(full)}" if unsound(full) else ""


def _sentence(metrics: Mapping[str, float], said: Mapping[str, str]) -> str:
    gains = [said[metric] for metric in _SHOWN[:3] if metric in said]
    parts = [f"Beside full precision this version is {_listed(gains)}"] if gains else []
    if "accuracy" in said:
        mine, full = metrics["accuracy"], metrics[f"accuracy{FULL}"]
        parts.append(
            f"it answers {formatted('accuracy', mine)} of the questions right, full precision "
            f"{formatted('accuracy', full)}"
        )
    if "top1_agreement" in metrics:
        same = formatted("top1_agreement", metrics["top1_agreement"])
        parts.append(f"on held-out text it would go on with the same word piece {same} of the time")
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _compared(metric: str, mine: float, full: float) -> str:
    """How a figure relates to full precision's; empty where there is nothing to relate."""
    if min(mine, full) <= 0:
        return ""
    if metric == "accuracy":
        return f"{mine / full:.0%} of its right answers in number"
    if metric == "tokens_per_second":
        return _times(mine, full, "faster", "slower", "as fast")
    where = "on disk" if metric == "size_bytes" else "in memory"
    return f"{_times(full, mine, 'smaller', 'larger', 'as large')} {where}"


def _times(one: float, other: float, more: str, less: str, alike: str) -> str:
    ratio = max(one, other) / min(one, other)
    if ratio < _ALIKE:
        return alike
    return f"{ratio:.1f} times {more if one > other else less}"


def _missing(names: list[str]) -> str:
    if not names:
        return ""
    return (
        f"Not measured of full precision: {_listed(names)}. It is asked in size full, once per "
        "checkpoint, where it fits into memory (evaluation.reference_answers)."
    )


def _listed(texts: list[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"
