"""Products with matrices that are read some rows at a time.

For a few states a product costs what reading its matrix costs. So many rows are taken that they,
turned into float32, stay in the processor's cache: then it is the stored weights alone, half as
large in bfloat16, that come from memory, and nothing of them stays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import linear

from phi3_mlflow.layers.room import CHUNK_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from phi3_mlflow.checkpoints.reader import CheckpointReader


def chunks(reader: CheckpointReader, name: str) -> Iterator[tuple[int, torch.Tensor]]:
    """Rows of a matrix in float32, some at a time, each time with the number of the first."""
    rows, columns = reader.shape(name)
    size = max(1, CHUNK_BYTES // (4 * columns))
    for start in range(0, rows, size):
        # Not `read_float`: it looks for infinities each time, which takes as long as the product.
        yield start, reader.read(name, slice(start, start + size)).to(torch.float32)


def multiply(reader: CheckpointReader, name: str, given: torch.Tensor) -> torch.Tensor:
    """States (places, in) times a matrix (out, in) of a checkpoint: float32 (places, out)."""
    found = torch.empty((len(given), reader.shape(name)[0]), dtype=torch.float32)
    for start, weights in chunks(reader, name):
        found[:, start : start + len(weights)] = linear(given, weights)
    return found


def likeliest(reader: CheckpointReader, name: str, given: torch.Tensor) -> torch.Tensor:
    """Of a product the number of the largest value in each row, int64 (places,).

    -1 where there is none: infinities and NaN.
    """
    best = torch.full((len(given),), -torch.inf)
    chosen = torch.full((len(given),), -1, dtype=torch.int64)
    broken = torch.zeros(len(given), dtype=torch.bool)
    for start, weights in chunks(reader, name):
        found, which = linear(given, weights).max(-1)
        broken |= ~found.isfinite()
        better = found > best
        best[better], chosen[better] = found[better], which[better] + start
    chosen[broken] = -1
    return chosen
