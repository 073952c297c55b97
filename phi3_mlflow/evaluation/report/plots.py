"""The report's plots, as matplotlib figures and as SVG that takes its colours from the page."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phi3_mlflow.evaluation.answers import NEEDLE, Answer
from phi3_mlflow.evaluation.statistics import wilson

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from phi3_mlflow.evaluation.divergence import TextScore

# What a plot is drawn in; in the page each becomes the variable of that name.
INK, MUTED, LINE, PAPER = "#1a1f2b", "#667085", "#e4e7ec", "#fefefe"
VERSION, CHAMPION, OTHER = "#3361e0", "#d9822b", "#98a2b3"
_VARIABLES = {
    INK: "ink", MUTED: "muted", LINE: "line", PAPER: "card",
    VERSION: "version", CHAMPION: "champion", OTHER: "other",
}  # fmt: skip


@dataclass(frozen=True)
class KnownVersion:
    """A version in the registry, as far as its tags tell."""

    number: str
    role: str
    size_bytes: float
    tokens_per_second: float
    kl_mean: float
    algorithm: str


def svg(figure: Figure, salt: str) -> str:
    """A plot as an inline SVG element; `salt` keeps the ids of two plots apart."""
    import matplotlib

    options: Any = {"svg.fonttype": "none", "svg.hashsalt": salt}
    buffer = io.StringIO()
    with matplotlib.rc_context(options):
        empty = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", metadata=empty, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for colour, name in _VARIABLES.items():
        text = text.replace(colour, f"var(--{name})")
    return re.sub(r"font: ([\d.]+)px [^;\"]+", r"font: \1px var(--font)", text)


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor=PAPER)
    axes = [figure.add_subplot(1, columns, i + 1) for i in range(columns)]
    for each in axes:
        each.set_facecolor(PAPER)
        each.tick_params(colors=MUTED, labelsize=9, length=0)
        each.grid(color=LINE, linewidth=0.8)
        each.set_axisbelow(True)
        for spine in each.spines.values():
            spine.set_visible(False)
    return figure, axes


def _titles(axes: Axes, x: str, y: str, title: str = "") -> None:
    axes.set_xlabel(x, color=MUTED, fontsize=9)
    axes.set_ylabel(y, color=MUTED, fontsize=9)
    if title:
        axes.set_title(title, color=INK, fontsize=10.5, loc="left")


def _legend(axes: Axes, **options: Any) -> None:
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, **options)


def _legend_above(axes: Axes) -> None:
    """Where there are as many rows as there happen to be, no corner is sure to be free."""
    _legend(axes, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)


def quality(versions: Sequence[KnownVersion]) -> Figure:
    """Divergence against size and against speed, one dot per version."""
    figure, (left, right) = _figure(9.2, 3.3, 2)
    colours = {"version": VERSION, "champion": CHAMPION}
    for axes, values, name in (
        (left, [known.size_bytes / 1e6 for known in versions], "size on disk, MB"),
        (right, [known.tokens_per_second for known in versions], "speed, tokens/s"),
    ):
        for known, value in zip(versions, values, strict=True):
            colour = colours.get(known.role, OTHER)
            axes.scatter([value], [known.kl_mean], s=70, color=colour, zorder=3)
            axes.annotate(
                f"v{known.number} {known.algorithm}", (value, known.kl_mean),
                textcoords="offset points", xytext=(7, 5), fontsize=9, color=INK,
            )  # fmt: skip
        _titles(axes, name, "KL divergence, nats")
        # Room on the right and above for what is written next to a dot.
        axes.set_xlim(0, 1.3 * max(values, default=1) or 1)
        axes.set_ylim(0, 1.3 * max((known.kl_mean for known in versions), default=1) or 1)
    return figure


def training(curve: Sequence[Mapping[str, float]]) -> Figure:
    """The loss of every step of a training run, and the loss on the rows set aside.

    Args:
        curve: points with `step` and `loss` or `validation_loss`.
    """
    figure, (axes,) = _figure(9.2, 2.9)
    for name, colour, style, text in (
        ("loss", OTHER, "-", "rows trained on, step by step"),
        ("validation_loss", VERSION, "o-", "rows set aside"),
    ):
        points = [(point["step"], point[name]) for point in curve if name in point]
        if points:
            steps, losses = zip(*points, strict=True)
            axes.plot(steps, losses, style, color=colour, lw=2, ms=5, label=text)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    _titles(axes, "step", "loss, nats per token")
    _legend(axes, loc="upper right")
    return figure


def category_names(answers: Sequence[Answer]) -> list[str]:
    """The categories there are: those of the questions, then those of long prompts."""
    return sorted({a.category for a in answers}, key=lambda name: (name.startswith(NEEDLE), name))


def categories(named: Mapping[str, Sequence[Answer]]) -> Figure:
    """The share of right answers per category, with 95 % intervals.

    Args:
        named: answers of the version and, when there is one, of the champion.
    """
    first = next(iter(named.values()))
    names = category_names(first)
    figure, (axes,) = _figure(9.2, 1.0 + 0.42 * len(names))
    height = 0.78 / len(named)
    for row, (who, answers) in enumerate(named.items()):
        colour = VERSION if row == 0 else CHAMPION
        found = []
        for name in names:
            right = [a.correct for a in answers if a.category == name]
            found.append(wilson(sum(right), len(right)))
        places = [i - 0.39 + height * (row + 0.5) for i in range(len(names))]
        shares = [100 * f.value for f in found]
        errors = [
            [100 * (f.value - f.low) for f in found],
            [100 * (f.high - f.value) for f in found],
        ]
        axes.barh(places, shares, height * 0.86, color=colour, alpha=0.85, label=who)
        axes.errorbar(
            shares, places, xerr=errors, fmt="none", ecolor=INK, elinewidth=1, capsize=2.5
        )
    counts = [sum(a.category == name for a in first) for name in names]
    axes.set_yticks(
        range(len(names)),
        [f"{n.replace('_', ' ')} ({c})" for n, c in zip(names, counts, strict=True)],
    )
    axes.tick_params(axis="y", colors=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.grid(axis="y", visible=False)
    _titles(axes, "answered right, % (with 95 % intervals)", "")
    if len(named) > 1:
        _legend_above(axes)
    return figure


def latency(named: Mapping[str, Sequence[Answer]]) -> Figure:
    """How many answers have begun, and are done, after how long: those asked one at a time."""
    figure, (left, right) = _figure(9.2, 2.9, 2)
    for row, (who, answers) in enumerate(named.items()):
        colour = VERSION if row == 0 else CHAMPION
        asked = [a for a in answers if a.alone and not a.category.startswith(NEEDLE)]
        first = [a.first_seconds for a in asked if a.first_seconds is not None]
        for axes, values in ((left, first), (right, [a.seconds for a in asked])):
            if values:
                share = [100 * (i + 1) / len(values) for i in range(len(values))]
                axes.step(sorted(values), share, where="post", color=colour, lw=2, label=who)
    _titles(left, "time to first token, s", "answers, %")
    _titles(right, "time to the whole answer, s", "")
    for axes in (left, right):
        axes.set_xlim(left=0)
        axes.set_ylim(0, 102)
    if len(named) > 1:
        _legend(right, loc="lower right")
    return figure


def divergence(named: Mapping[str, Sequence[TextScore]]) -> Figure:
    """The divergence on each held-out text."""
    first = sorted(next(iter(named.values())), key=lambda s: s.kl / s.places)
    names = [score.text_id for score in first]
    figure, (axes,) = _figure(9.2, 0.9 + 0.24 * len(names))
    for row, (who, scores) in enumerate(named.items()):
        colour = VERSION if row == 0 else CHAMPION
        by_name = {s.text_id: s.kl / s.places for s in scores}
        places = [i for i, name in enumerate(names) if name in by_name]
        values = [by_name[names[i]] for i in places]
        axes.scatter(values, places, s=34, color=colour, label=who, zorder=3 - row)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", colors=INK)
    axes.set_xlim(left=0)
    axes.set_ylim(-0.7, len(names) - 0.3)
    _titles(axes, "KL divergence, nats", "")
    if len(named) > 1:
        _legend_above(axes)
    return figure
