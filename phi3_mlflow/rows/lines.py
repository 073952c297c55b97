"""The lines of a file, one at a time, none of them longer than a row can be."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MAX_LINE_BYTES = 16 * 1024 * 1024
"""A longer line is not a row that any model could answer, and is not read into memory."""


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """The lines of a file with their ends, and their numbers from 1.

    A byte-order mark is left out; a line that is too long is given as None.
    """
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                _skip_line(file, line)
                yield number, None
            else:
                yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _skip_line(file: IO[bytes], line: bytes) -> None:
    while line and not line.endswith(b"\n"):
        line = file.readline(MAX_LINE_BYTES)
