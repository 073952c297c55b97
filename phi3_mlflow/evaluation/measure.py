"""Everything that is measured of one version, and the verdict on it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from phi3_mlflow import console
from phi3_mlflow.evaluation.answers import Answers, ask
from phi3_mlflow.evaluation.divergence import Divergence, compare, tokenize
from phi3_mlflow.evaluation.gate import Verdict, judge
from phi3_mlflow.evaluation.logits import find_model, open_logits
from phi3_mlflow.evaluation.rows import HeldoutText, Question
from phi3_mlflow.profiles import Bound

SAMPLE = Question.model_validate(
    {
        "id": "sample",
        "category": "sample",
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "check": {"kind": "exact", "value": "Paris"},
        "max_tokens": 96,
    }
)
"""Asked of every version and shown to whoever started the run; it does not count."""


@dataclass(frozen=True)
class Result:
    """What was found of one version."""

    metrics: Mapping[str, float]
    verdict: Verdict
    sample: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        return {
            "metrics": dict(self.metrics),
            "verdict": self.verdict.to_dict(),
            "sample": dict(self.sample),
        }


def measure(
    model_uri: str,
    *,
    reference: Path,
    texts: Sequence[HeldoutText],
    questions: Sequence[Question],
    window: int,
    thresholds: Mapping[str, Bound],
    out: Path,
) -> Result:
    """Measure a version and judge it.

    Args:
        model_uri: the version.
        reference: the full-precision checkpoint.
        texts: held-out texts for perplexity and divergence.
        questions: questions for accuracy.
        window: tokens scored in one piece.
        thresholds: of the gate.
        out: a folder that gets `answers.jsonl`, `texts.jsonl`, `metrics.json`, `verdict.json`.
    """
    out.mkdir(parents=True)
    model = local_files(model_uri)
    with console.progress("questions", len(questions) + 1, "answered") as bar:
        shown, *counted = (asked := ask(model_uri, [SAMPLE, *questions], bar)).answers
        answers = replace(asked, answers=tuple(counted))
    divergence = diverge(reference, model, texts, window)
    metrics = {
        **divergence.metrics(),
        **answers.metrics(),
        "size_bytes": float(
            sum(f.stat().st_size for f in find_model(model).rglob("*") if f.is_file())
        ),
    }
    verdict = judge(metrics, thresholds)
    _write(out, metrics, verdict, answers, divergence)
    sample = {"question": SAMPLE.messages[-1].content, "answer": shown.text}
    return Result(metrics, verdict, sample)


def diverge(
    reference: Path, candidate: Path, texts: Sequence[HeldoutText], window: int
) -> Divergence:
    """Compare a model's files with the full-precision checkpoint on held-out texts."""
    tokens = tokenize(reference, ((text.id, text.text) for text in texts))
    total = sum(len(ids) for _, ids in tokens)
    with console.progress("held-out text", total, "tokens") as bar:
        return compare(
            open_logits(reference, window),
            open_logits(candidate, window),
            tokens,
            window,
            bar.advance,
        )


def local_files(model_uri: str) -> Path:
    """A logged model's files; nothing is copied where the store is on this machine."""
    import mlflow

    return Path(mlflow.artifacts.download_artifacts(artifact_uri=model_uri))


def _write(
    out: Path,
    metrics: Mapping[str, float],
    verdict: Verdict,
    answers: Answers,
    divergence: Divergence,
) -> None:
    _write_lines(out / "answers.jsonl", [answer.row() for answer in answers.answers])
    _write_lines(out / "texts.jsonl", [vars(score) for score in divergence.scores])
    for name, content in (("metrics", dict(metrics)), ("verdict", verdict.to_dict())):
        (out / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def _write_lines(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.write_text("".join(lines), "utf-8")
