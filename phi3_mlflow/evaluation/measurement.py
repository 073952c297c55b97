"""What was measured of one model, as files in a folder.

metrics.json    metric to value; `phi3_mlflow.evaluation.metrics` says what they mean
answers.jsonl   one `Answer` per line
texts.jsonl     one `TextScore` per line
sample.json     a question and its answer, to show
task_answers.jsonl, task_scores.jsonl   `Answer` and `TaskScore`, of a fine-tuned model's task
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phi3_mlflow.evaluation.answers import Answer, read_answers
from phi3_mlflow.evaluation.divergence import TextScore, read_scores
from phi3_mlflow.evaluation.task import TaskScore

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_TASK_ANSWERS, _TASK_SCORES = "task_answers.jsonl", "task_scores.jsonl"


@dataclass(frozen=True)
class Measurement:
    """What was measured of one model.

    Attributes:
        metrics: metric to value.
        answers: to the general questions and long prompts.
        scores: on the held-out texts.
        sample: a question and its answer, to show.
        task_answers: to the questions of the task it was fine-tuned for, if it was.
        task_scores: the loss on the same rows.
    """

    metrics: Mapping[str, float]
    answers: tuple[Answer, ...]
    scores: tuple[TextScore, ...]
    sample: Mapping[str, str]
    task_answers: tuple[Answer, ...] = ()
    task_scores: tuple[TaskScore, ...] = ()

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
            tuple(read_answers(folder / _TASK_ANSWERS)),
            tuple(TaskScore(**json.loads(line)) for line in _lines(folder / _TASK_SCORES)),
        )

    def write(self, folder: Path) -> None:
        """Write the files into a folder."""
        _write_lines(folder / "answers.jsonl", [answer.row() for answer in self.answers])
        _write_lines(folder / "texts.jsonl", [vars(score) for score in self.scores])
        _write_lines(folder / _TASK_ANSWERS, [answer.row() for answer in self.task_answers])
        _write_lines(folder / _TASK_SCORES, [vars(score) for score in self.task_scores])
        write_json(folder / "metrics.json", dict(self.metrics))
        write_json(folder / "sample.json", dict(self.sample))


def write_json(file: Path, content: Any) -> None:
    """Write JSON for programs and for people: indented, every letter as it is."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _lines(file: Path) -> list[str]:
    return file.read_text("utf-8").splitlines()


def _write_lines(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.write_text("".join(lines), "utf-8")
