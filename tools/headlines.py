"""The README's headline figures: picked by name out of benchmarks/results, never typed in."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _result import format_table


@dataclass(frozen=True)
class Table:
    """A benchmark's table, its rows found by what stands in their cells."""

    columns: list[str]
    rows: list[list[Any]]

    @classmethod
    def read(cls, path: Path) -> Table:
        table = json.loads(path.read_text(encoding="utf-8"))["table"]
        return cls(table["columns"], table["rows"])

    def number(self, column: str, *row: object) -> float:
        """The cell of ``column`` in the one row that begins with the cells ``row``."""
        (found,) = [cells for cells in self.rows if tuple(cells[: len(row)]) == row]
        return float(found[self.columns.index(column)])

    def total(self, column: str) -> int:
        """The sum of a column."""
        place = self.columns.index(column)
        return sum(int(cells[place]) for cells in self.rows)


@dataclass(frozen=True)
class Headline:
    """One line: what was measured, the figure, and what it is compared with.

    Attributes:
        what: what was measured.
        file: the benchmark's name in benchmarks/results.
        anchor: the section of docs/benchmarks.md that has the table.
        figures: makes two texts of the table, the figure and its counterpart.
    """

    what: str
    file: str
    anchor: str
    figures: Callable[[Table], tuple[str, str]]


def _memory(table: Table) -> tuple[str, str]:
    steps = ("quantize, rtn", "export, rtn")
    ours = max(table.number("peak RSS (GB)", step) for step in steps)
    stock = table.number("peak RSS (GB)", "stock builder, from that checkpoint")
    return f"{ours:.1f} GB", f"{stock:.1f} GB: onnxruntime-genai's builder on the int4 checkpoint"


def _divergence(table: Table) -> tuple[str, str]:
    ours, rtn = (table.number("KL", name) for name in ("gptq mixed", "rtn"))
    sizes = [table.number("data (MB)", name) for name in ("gptq mixed", "rtn")]
    return f"{ours:.3f} at {sizes[0]:.0f} MB", f"{rtn:.3f} at {sizes[1]:.0f} MB: round to nearest"


def _decode(table: Table) -> tuple[str, str]:
    column = "decode, tokens/s"
    ours, full = (table.number(column, name) for name in ("onnx int4", "transformers fp32"))
    return f"{ours:.0f} tokens/s", f"{full:.0f} tokens/s: transformers in float32"


def _clients(table: Table) -> tuple[str, str]:
    names = ("serve (this project)", "mlflow models serve")
    ours, theirs = (table.number("tokens/s", name, 8) for name in names)
    return f"{ours:.0f} tokens/s", f"{theirs:.0f} tokens/s: `mlflow models serve`"


def _kills(table: Table) -> tuple[str, str]:
    kills, same = table.total("kills"), table.total("same bytes")
    left = sum(table.total(name) for name in ("debris", "processes left", "runs left RUNNING"))
    return f"{same} of {kills}", f"files, processes and runs left over: {left}"


HEADLINES = (
    Headline("Peak memory to make Phi-3-mini (7.6 GB) int4 ONNX", "quantize_memory_stock",
             "phi-3-mini-on-a-small-machine", _memory),
    Headline("KL divergence from full precision, default model", "quantize_quality",
             "quality-against-size", _divergence),
    Headline("Decoding, default model", "chat_flavors", "the-logged-model", _decode),
    Headline("Eight clients at once, all together", "serve_clients", "serving", _clients),
    Headline("Kills at random moments that ended with the same bytes", "soak_kills",
             "reliability", _kills),
)  # fmt: skip


def headlines_table(results: Path) -> str:
    """The table of headline figures.

    Args:
        results: the folder with the benchmarks' results.

    Raises:
        OSError, LookupError, ValueError: a result, row or column that a headline names is missing.
    """
    rows = []
    for line in HEADLINES:
        figure, counterpart = line.figures(Table.read(results / f"{line.file}.json"))
        rows.append([f"[{line.what}](docs/benchmarks.md#{line.anchor})", figure, counterpart])
    return format_table(["Measured on 2 cores, no GPU", "Here", "Compared with"], rows)
