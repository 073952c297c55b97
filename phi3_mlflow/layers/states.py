"""The hidden states of texts, worked on a part at a time: in memory, or in a file if they are many.

The file is read and written with ordinary calls, not mapped: mapped pages would count as this
process's memory.
"""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import torch

from phi3_mlflow.layers.room import IN_MEMORY

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_ITEM_BYTES = 4


class States:
    """A float32 matrix (places, width).

    Args:
        places: rows, one per token.
        width: of a row.
        folder: where the file lies that holds what is too much for memory; it has no name, so that
            nothing is left of it when the process ends, however that comes. None: the system's
            folder for temporary files.
        most: bytes that are held in memory.
    """

    def __init__(
        self, places: int, width: int, *, folder: Path | None = None, most: int = IN_MEMORY
    ) -> None:
        self.places, self.width = places, width
        self._matrix: torch.Tensor | None = None
        self._stream: BinaryIO | None = None
        if places * width * _ITEM_BYTES <= most:
            self._matrix = torch.empty((places, width), dtype=torch.float32)
        else:
            file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (kept open)
            self._stream = cast("BinaryIO", file)

    @classmethod
    def stored(cls, file: Path, width: int) -> States:
        """States that `save` has written, read from the file as they are wanted."""
        states = cls(0, width)
        states.places = file.stat().st_size // (width * _ITEM_BYTES)
        states._matrix = None
        states._stream = cast("BinaryIO", file.open("rb", buffering=0))
        return states

    def read(self, start: int, stop: int) -> torch.Tensor:
        """The rows from `start` to `stop`; change them and `write` them back."""
        if self._matrix is not None:
            return self._matrix[start:stop]
        assert self._stream is not None
        rows = torch.empty((min(stop, self.places) - start, self.width), dtype=torch.float32)
        self._stream.seek(start * self.width * _ITEM_BYTES)
        view, done = _bytes_of(rows), 0
        while done < len(view):
            count = cast("Any", self._stream).readinto(view[done:])
            if not count:
                raise EOFError(f"the file of hidden states ends before row {stop}")
            done += count
        return rows

    def rows(self, places: torch.Tensor) -> torch.Tensor:
        """A copy of single rows, by their numbers, int64 in rising order, which lie close by."""
        if not len(places):
            return torch.empty((0, self.width), dtype=torch.float32)
        first = int(places[0])
        return self.read(first, int(places[-1]) + 1)[places - first]

    def write(self, start: int, rows: torch.Tensor) -> None:
        """Replace rows."""
        if self._matrix is not None:
            target = self._matrix[start : start + len(rows)]
            if target.data_ptr() != rows.data_ptr():
                target.copy_(rows)
            return
        assert self._stream is not None
        self._stream.seek(start * self.width * _ITEM_BYTES)
        _write_all(self._stream, rows)

    def parts(self, size: int) -> Iterator[tuple[int, int]]:
        """Start and stop of parts of `size` rows."""
        for start in range(0, self.places, size):
            yield start, min(start + size, self.places)

    def save(self, stream: BinaryIO, part: int = 4096) -> None:
        """Write all rows to a file, little-endian float32, row by row."""
        for start, stop in self.parts(part):
            _write_all(stream, self.read(start, stop))

    def load(self, stream: BinaryIO, part: int = 4096) -> None:
        """Take over what `save` has written.

        Raises:
            EOFError: the file is too short.
        """
        for start, stop in self.parts(part):
            rows = torch.empty((stop - start, self.width), dtype=torch.float32)
            view = _bytes_of(rows)
            if cast("Any", stream).readinto(view) != len(view):
                raise EOFError(f"the file of hidden states ends before row {stop}")
            self.write(start, rows)

    def copy(self, *, folder: Path | None = None, most: int = IN_MEMORY) -> States:
        """States of their own with the same rows."""
        other = States(self.places, self.width, folder=folder, most=most)
        for start, stop in self.parts(4096):
            other.write(start, self.read(start, stop))
        return other


def _bytes_of(rows: torch.Tensor) -> memoryview:
    return rows.contiguous().view(-1).view(torch.uint8).numpy().data


def _write_all(stream: BinaryIO, rows: torch.Tensor) -> None:
    view, done = _bytes_of(rows), 0
    while done < len(view):
        done += stream.write(view[done:])
