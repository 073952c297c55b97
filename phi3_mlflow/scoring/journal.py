"""The journal next to the output: what is done already, whatever happens to the process.

A journal is a text file that is only appended to. Each line is a checksum (CRC-32 of the rest, in
hex), a space and JSON: first the header, which says what the results depend on, then one line per
batch, `[[index, response, finish_reason, prompt_tokens, completion_tokens, error], ...]`. A batch
counts when its line is whole and on the disk; a line that a kill cut off, or that was damaged
since, is cut away with all that follows it, and its rows are scored again.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from array import array
from collections import OrderedDict
from typing import IO, TYPE_CHECKING, Any

from phi3_mlflow.core.errors import UserError, problem_list
from phi3_mlflow.scoring.requests import Result

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

FORMAT = 1
_ABSENT = -1
_KEPT_BATCHES = 64  # in memory while the output is written: batches lie among each other


class Journal:
    """An open journal; this process alone has it.

    Args:
        path: made when it is not there.
        header: what the results depend on, flat; a journal with another one is refused.
        rows: how many rows the input has.
        adopt: keys of the header whose value is taken from the journal when there is one.

    Raises:
        UserError: another process has it, or it belongs to other results.
    """

    def __init__(
        self, path: Path, header: Mapping[str, Any], rows: int, adopt: Sequence[str] = ()
    ) -> None:
        self.path = path
        self._offsets = array("q", [_ABSENT]) * rows
        self._recent: OrderedDict[int, dict[int, Result]] = OrderedDict()
        self.done = 0
        self._file = _locked(path)
        try:
            self.header = self._begin({"journal": FORMAT, **header}, adopt)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def __contains__(self, index: int) -> bool:
        return self._offsets[index] != _ABSENT

    def append(self, batch: Sequence[tuple[int, Result]]) -> None:
        """Add the results of a batch; they are on the disk when this returns."""
        offset = self._file.seek(0, os.SEEK_END)
        self._write([[index, *result.values()] for index, result in batch])
        for index, _ in batch:
            self._note(index, offset)

    def result(self, index: int) -> Result:
        """The result of a row that is in the journal."""
        offset = self._offsets[index]
        if offset == _ABSENT:
            raise KeyError(index)
        if offset not in self._recent:
            self._recent[offset] = self._batch(offset)
            if len(self._recent) > _KEPT_BATCHES:
                self._recent.popitem(last=False)
        return self._recent[offset][index]

    def _batch(self, offset: int) -> dict[int, Result]:
        self._file.seek(offset)
        content = _content(self._file.readline())
        if not isinstance(content, list):
            raise UserError(f"{self.path}: was changed by somebody else; run the same again")
        return {item[0]: Result(*item[1:]) for item in content}

    def remove(self) -> None:
        """Delete the file; what was open stays readable until it is closed."""
        self.path.unlink()

    def _begin(self, header: dict[str, Any], adopt: Sequence[str]) -> dict[str, Any]:
        self._file.seek(0)
        found = _content(self._file.readline())
        if not isinstance(found, dict):
            # Nothing, or the torn first line of a process that was killed at once.
            if self._file.seek(0, os.SEEK_END) and not self._torn_header():
                raise UserError(
                    f"{self.path} exists and is not a journal of scoring; name another output"
                )
            self._file.truncate(0)
            self._write(header)
            return header
        header |= {name: found[name] for name in adopt if name in found}
        _refuse_other(self.path, found, header)
        self._read_batches()
        return header

    def _torn_header(self) -> bool:
        self._file.seek(0)
        start = self._file.read(64)
        return b"\n" not in start and bool(re.fullmatch(rb"[0-9a-f]{0,8}|[0-9a-f]{8} .*", start))

    def _read_batches(self) -> None:
        offset = self._file.tell()
        while line := self._file.readline():
            content = _content(line)
            if not isinstance(content, list):
                break
            for item in content:
                self._note(item[0], offset)
            offset += len(line)
        self._file.truncate(offset)

    def _note(self, index: int, offset: int) -> None:
        self.done += self._offsets[index] == _ABSENT
        self._offsets[index] = offset

    def _write(self, content: Any) -> None:
        # ASCII, so that no text, not even half a character, can break a line or its encoding.
        text = json.dumps(content, separators=(",", ":")).encode("ascii")
        self._file.seek(0, os.SEEK_END)
        self._file.write(b"%08x %b\n" % (zlib.crc32(text), text))
        self._file.flush()
        os.fsync(self._file.fileno())


def _content(line: bytes) -> Any:
    """The JSON of a whole line, or None."""
    checksum, _, text = line.partition(b" ")
    if not text.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text[:-1]):
        return None
    return json.loads(text)


def _locked(path: Path) -> IO[bytes]:
    """Open the file for this process alone; the lock is gone when the process is."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = path.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UserError(
                f"{path} is in use: another process writes the same output. Wait for it, or name "
                "another output."
            ) from None
        # Between opening and locking, the process before may have finished and removed it.
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            return file
        file.close()


def _refuse_other(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    differences = [
        f"{name}: {found.get(name, 'nothing')} before, {wanted.get(name, 'nothing')} now"
        for name in {**found, **wanted}
        if found.get(name) != wanted.get(name)
    ]
    if differences:
        raise UserError(
            problem_list(
                f"{path} was begun with something else",
                differences,
                "Ask for the same again to go on with it, name another output, or begin anew: "
                "-P force=true",
            )
        )
