"""Score a file without a model, and end this process by SIGKILL at a chosen moment.

    python killed.py INPUT OUTPUT MOMENT

MOMENT: `none`, `batch:N` (after N batches are in the journal), `half:N` (in the midst of writing
the Nth line of the journal, the header being the first), `output`, `record`, `removal` (just
before the output, the record, the removal of the journal).
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from phi3_mlflow.scoring import journal as journals
from phi3_mlflow.scoring import score as scoring
from phi3_mlflow.scoring.job import ScoringJob
from phi3_mlflow.scoring.requests import Result


class EchoEngine:
    """Answers without a model: what a row asked, and how often it was asked."""

    def __init__(self) -> None:
        self.models_loaded = 0
        self.asked: list[int] = []
        self.fail_after: int | None = None

    def run(self, batches: Iterable[Sequence[tuple[int, str]]]) -> Iterable[list[Any]]:
        for batch in batches:
            if self.fail_after is not None and len(self.asked) >= self.fail_after:
                raise KeyboardInterrupt
            self.asked += [index for index, _ in batch]
            yield [(i, Result(f"said {request}", "stop", 3, 2)) for i, request in batch]


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def aim(moment: str) -> None:
    """Put SIGKILL in the place of what happens at a moment."""
    name, _, number = moment.partition(":")
    count = 0
    plain_write, plain_append = journals.Journal._write, journals.Journal.append
    plain_to_disk = scoring._to_disk

    def write(self: Any, content: Any) -> None:
        nonlocal count
        count += 1
        if count == int(number):
            self._file.seek(0, os.SEEK_END)
            self._file.write(b"01234567 [[0,")
            self._file.flush()
            die()
        plain_write(self, content)

    def append(self: Any, batch: Any) -> None:
        nonlocal count
        plain_append(self, batch)
        count += 1
        if count == int(number):
            die()

    def to_disk(part: Path, target: Path) -> None:
        if target.name.endswith(".score.json") == (name == "record"):
            die()
        plain_to_disk(part, target)

    if name == "half":
        journals.Journal._write = write
    elif name == "batch":
        journals.Journal.append = append
    elif name in ("output", "record"):
        scoring._to_disk = to_disk
    elif name == "removal":
        journals.Journal.remove = die


if __name__ == "__main__":
    given, wanted, when = sys.argv[1:]
    engine = EchoEngine()
    scoring.inspect_model = lambda uri: scoring.ScoredModel(Path(), uri, False, True)
    scoring._engine = lambda *_: engine
    aim(when)
    scoring.score(ScoringJob(Path(given), Path(wanted), "models:/x/1", batch_size=3))
    print(" ".join(map(str, engine.asked)))
