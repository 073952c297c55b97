"""Write the result of a benchmark as JSON, with the machine it was measured on, and print it.

A benchmark script ends with one call::

    from _result import write_result           # run as: python benchmarks/NAME.py

    write_result(
        "decode",                               # benchmarks/results/decode.json
        "Decode speed, SmolLM2-135M, 2 threads",
        ["runtime", "tokens/s"],
        [["onnxruntime-genai int4", 97.3], ["transformers fp32", 10.1]],
        notes="128 new tokens after a prompt of 64, median of 5.",
    )

The file has the keys ``title``, ``date``, ``machine``, ``versions``, ``table`` (``columns`` and
``rows``), ``notes`` and, where given, ``extra`` (raw figures; never shown in a document).
``tools/generate.py`` makes of it the block between the markers ``benchmark:NAME`` in docs/.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"

# What changes the figures when it moves; a library that is not installed is left out.
LIBRARIES = (
    "mlflow",
    "transformers",
    "torch",
    "onnxruntime-genai",
    "onnxruntime-genai-cuda",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnx",
    "onnx-ir",
    "numpy",
    "optimum",
    "gptqmodel",
    "llama-cpp-python",
)

Cell = str | int | float | bool | None
WIDEST = 40


def machine() -> dict[str, Any]:
    """CPU model, usable cores, memory in GB (10**9 bytes), operating system, and the GPU if any."""
    facts: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_gb": _memory_gb(),
        "os": _os_name(),
    }
    gpu = _gpu_name()
    if gpu:
        facts["gpu"] = gpu
    return facts


def versions() -> dict[str, str]:
    """Python's version and those of the installed libraries that matter to a measurement."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_result(
    name: str,
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    notes: str = "",
    extra: Mapping[str, Any] | None = None,
    directory: Path | None = None,
) -> Path:
    """Write ``results/NAME.json`` and print the table.

    ``name`` is lower case letters, digits, ``-`` and ``_``; every row has one cell a column: a
    string, a number, a bool or None. Raises ValueError for anything else, before a byte is written.
    The file replaces its predecessor in one rename.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
        raise ValueError(f"result name {name!r}: use lower case letters, digits, '-' and '_'")
    if not columns:
        raise ValueError(f"result {name!r} has no columns")
    for number, row in enumerate(rows):
        if len(row) != len(columns):
            raise ValueError(
                f"result {name!r}, row {number}: {len(row)} cells for {len(columns)} columns"
            )
        for cell in row:
            if cell is not None and not isinstance(cell, str | int | float | bool):
                raise ValueError(
                    f"result {name!r}, row {number}: a cell is {type(cell).__name__}, "
                    "allowed are str, int, float, bool and None"
                )
    result: dict[str, Any] = {
        "title": title,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "table": {"columns": list(columns), "rows": [list(row) for row in rows]},
        "notes": notes,
    }
    if extra:
        result["extra"] = dict(extra)
    text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    folder = directory or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    partial = folder / f".{name}.{os.getpid()}.part"
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)

    print(f"\n{title}\n\n{format_table(columns, rows)}\n")
    if notes:
        print(f"{notes}\n")
    print(f"written to {path}")
    return path


def format_cell(cell: Cell) -> str:
    """A cell as text: floats with about four significant digits, thousands separated by commas."""
    if cell is None:
        return "–"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, int):
        return f"{cell:,}"
    if isinstance(cell, float):
        if cell != 0 and abs(cell) < 0.001:
            return f"{cell:.2e}"
        digits = 0 if abs(cell) >= 1000 else 1 if abs(cell) >= 100 else 2 if abs(cell) >= 10 else 3
        return f"{cell:,.{digits}f}"
    return cell


def format_table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A Markdown table with aligned columns; columns of numbers are right-aligned."""
    texts = [[format_cell(cell).replace("|", "\\|").replace("\n", " ") for cell in r] for r in rows]
    heads = [column.replace("|", "\\|") for column in columns]
    numeric = [
        bool(rows) and all(isinstance(row[i], int | float) or row[i] is None for row in rows)
        for i in range(len(columns))
    ]
    # Padding is for reading the source; beyond WIDEST one long cell would stretch every row.
    widths = [
        min(WIDEST, max(3, len(head), *(len(t[i]) for t in texts))) for i, head in enumerate(heads)
    ]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, numeric, strict=True)
        )
        return "| " + " | ".join(padded) + " |"

    rule = (
        "-" * (width - 1) + ":" if right else "-" * width
        for width, right in zip(widths, numeric, strict=True)
    )
    return "\n".join([line(heads), "| " + " | ".join(rule) + " |", *(line(t) for t in texts)])


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for row in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if row.startswith("model name"):
                return row.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (AttributeError, OSError, ValueError):
        return None


def _os_name() -> str:
    try:
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {platform.release()}"
    except (OSError, KeyError):
        return platform.platform()


def _gpu_name() -> str | None:
    # Only when torch is loaded already: importing it costs seconds and is the benchmark's business.
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    return str(torch.cuda.get_device_name(0))
