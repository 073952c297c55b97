"""The machine that measurements were made on, in a few words."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def hardware() -> str:
    """Processor, threads, memory and system."""
    import psutil

    memory = psutil.virtual_memory().total / 1e9
    return f"{_processor()}, {os.cpu_count()} threads, {memory:.0f} GB, {platform.system()}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
