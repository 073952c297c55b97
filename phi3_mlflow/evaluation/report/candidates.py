"""The plot of a search: every candidate's quality against its size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phi3_mlflow.evaluation.report.plots import INK, LINE, MUTED, PAPER

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.figure import Figure


def pareto(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Divergence against size, the colour the speed, a line through the candidates not beaten.

    Args:
        rows: of each measured candidate `candidate`, `data_bytes`, `kl_mean` (nats),
            `tokens_per_second`, `on_front` and `within_budget`; the first is the one chosen.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 5.0), layout="constrained", facecolor=PAPER)
    axes = figure.add_subplot()
    axes.set_facecolor(PAPER)
    size = [row["data_bytes"] / 1e6 for row in rows]
    kl = [row["kl_mean"] for row in rows]
    front = sorted((s, k) for s, k, row in zip(size, kl, rows, strict=True) if row["on_front"])
    axes.plot(*zip(*front, strict=True), color=MUTED, lw=1.2, ls="--", zorder=1,
              label="not beaten in both") if front else None  # fmt: skip
    speeds = [row["tokens_per_second"] for row in rows]
    dots = axes.scatter(
        size, kl, c=speeds, cmap="viridis", s=90, zorder=3, edgecolors=INK, linewidths=0.8
    )
    beyond = [i for i, row in enumerate(rows) if not row["within_budget"]]
    if beyond:
        axes.scatter(
            [size[i] for i in beyond], [kl[i] for i in beyond], marker="x", s=160, color=INK,
            linewidths=1.2, zorder=4, label="beyond the budget",
        )  # fmt: skip
    if rows and rows[0]["within_budget"]:
        axes.scatter(
            size[:1], kl[:1], s=260, facecolors="none", edgecolors=INK, linewidths=1.6, zorder=2,
            label="chosen",
        )  # fmt: skip
    middle = (min(size) + max(size)) / 2 if size else 0.0
    for i, row in enumerate(rows):
        left = size[i] > middle  # of its point, so that a long name does not leave the plot
        axes.annotate(
            row["candidate"], (size[i], kl[i]), xytext=(-9 if left else 9, 7), fontsize=9,
            textcoords="offset points", ha="right" if left else "left", color=INK,
        )  # fmt: skip
    figure.colorbar(dots, ax=axes, label="decoding, tokens/s", pad=0.01)
    axes.set_xlabel("model.onnx.data, MB", color=MUTED, fontsize=9)
    axes.set_ylabel("KL divergence from full precision, nats", color=MUTED, fontsize=9)
    axes.set_title("Candidates: lower and further left is better", color=INK, loc="left")
    axes.grid(color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.16, y=0.14)
    axes.set_ylim(bottom=0)
    axes.tick_params(colors=MUTED, labelsize=9, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    return figure
