"""What was measured of one model, as files in a folder.

metrics.json    metric to value; `phi3_mlflow.evaluation.metrics` says what they mean
answers.jsonl   one `Answer` per line
texts.jsonl     one `TextScore` per line
sample.json     a question and its answer, to show
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phi3_mlflow.evaluation.answers import Answer, read_answers
from phi3_mlflow.evaluation.divergence import TextScore, read_scores

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


@dataclass(frozen=True)
class Measurement:
    """What was measured of one model."""

    metrics: Mapping[str, float]
    answers: tuple[Answer, ...]
    scores: tuple[TextScore, ...]
    sample: Mapping[str, str]

    @classmethod
    def read(cls, folder: Path) -> Measurement:
        """What `write` left in a folder."""

        def load(name: str) -> Any:
            return json.loads((folder / name).read_text("utf-8"))

        return cls(
            load("metrics.json"),
            tuple(read_answers(folder / "answers.jsonl")),
            tuple(read_scores(folder / "texts.jsonl")),
            load("sample.json"),
        )

    def write(self, folder: Path) -> None:
        """Write the four files into a folder."""
        _write_lines(folder / "answers.jsonl", [answer.row() for answer in self.answers])
        _write_lines(folder / "texts.jsonl", [vars(score) for score in self.scores])
        write_json(folder / "metrics.json", dict(self.metrics))
        write_json(folder / "sample.json", dict(self.sample))


def write_json(file: Path, content: Any) -> None:
    """Write JSON for programs and for people: indented, every letter as it is."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _write_lines(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.write_text("".join(lines), "utf-8")
