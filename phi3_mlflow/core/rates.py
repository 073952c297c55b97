"""How fast this machine is, measured in a second: for a rough idea of how long work will take."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_SECONDS = 0.3  # for each figure
_SIDE = 768  # of the matrices that are multiplied
_BYTES = 1 << 25


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second.

    Attributes:
        products: multiplications in a product of float32 matrices.
        memory: bytes copied from memory to memory.
        disk: bytes written and on the disk.
    """

    products: float
    memory: float
    disk: float


def measure_rates(folder: Path) -> Rates:
    """Measure them now, with whatever else the machine is doing.

    Args:
        folder: on the disk that is to be measured; made if it is not there.
    """
    import numpy as np

    matrix = np.ones((_SIDE, _SIDE), dtype=np.float32)
    block = np.ones(_BYTES, dtype=np.uint8)

    def multiply() -> None:
        matrix @ matrix

    def write() -> None:
        with tempfile.TemporaryFile(dir=folder) as stream:
            stream.write(block.data)
            stream.flush()
            os.fsync(stream.fileno())

    folder.mkdir(parents=True, exist_ok=True)
    return Rates(
        products=_SIDE**3 * _per_second(multiply),
        memory=_BYTES * _per_second(block.copy),
        disk=_BYTES * _per_second(write),
    )


def _per_second(once: Callable[[], object]) -> float:
    once()  # the first time pays for threads and pages
    start, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < _SECONDS or not count:
        once()
        count += 1
    return count / elapsed
