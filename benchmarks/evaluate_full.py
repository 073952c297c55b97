"""The evaluation of size full on the embedded default: every text, every question, long prompts.

    python benchmarks/evaluate_full.py

Runs `main` with `size=full`, which does what is not in the cache yet (half an hour, of which the
evaluation is the most), and reads what `evaluate` left. A champion, should there be one, is
measured too; in a fresh tracking store there is none.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from _result import Cell, write_result  # noqa: E402

from phi3_mlflow.artifacts.cache import StepCache  # noqa: E402
from phi3_mlflow.core.errors import EXIT_DONE, EXIT_GATE  # noqa: E402
from phi3_mlflow.evaluation.answers import NEEDLE, Answer, read_answers  # noqa: E402
from phi3_mlflow.evaluation.divergence import read_scores  # noqa: E402
from phi3_mlflow.evaluation.metrics import formatted, label  # noqa: E402
from phi3_mlflow.evaluation.statistics import wilson  # noqa: E402
from phi3_mlflow.stages import evaluate  # noqa: E402
from phi3_mlflow.tracking.connection import connect  # noqa: E402

PROFILE = "smollm2-135m"
OF_TEXTS = ("perplexity", "perplexity_reference", "kl_mean", "top1_agreement")
OF_ANSWERS = (
    "tokens_per_second",
    "tokens_per_second_p95",
    "time_to_first_token_s",
    "time_to_first_token_p95_s",
    "repetition_rate",
    "endless_rate",
    "peak_memory_bytes",
)


def evaluated() -> tuple[Path, dict[str, float]]:
    """The folder of what was measured, and the metrics of the run that measured it."""
    import mlflow

    command = [sys.executable, "-m", "steps.main", "--profile", PROFILE, "--size", "full"]
    code = subprocess.run(command, cwd=ROOT).returncode
    if code not in (EXIT_DONE, EXIT_GATE):
        raise SystemExit(code)
    connect()
    entry = StepCache().latest(PROFILE, "evaluate", evaluate.STEP.slot)
    if entry is None:
        raise SystemExit("evaluate has left nothing")
    record = evaluate.STEP.record_of(entry)
    (uri,) = record.versions
    return entry.path / Path(uri).name, mlflow.get_run(record.run_id).data.metrics


def share(name: str, answers: list[Answer], on: str) -> list[Cell]:
    right = sum(answer.correct for answer in answers)
    found = wilson(right, len(answers))
    return [name, f"{found.value:.1%} ({found.low:.0%} – {found.high:.0%})", f"{len(answers)} {on}"]


def main() -> None:
    folder, run = evaluated()
    metrics = json.loads((folder / "metrics.json").read_text())
    answers, scores = read_answers(folder / "answers.jsonl"), read_scores(folder / "texts.jsonl")
    asked = [answer for answer in answers if not answer.category.startswith(NEEDLE)]
    on_texts = f"{len(scores)} texts, {metrics['scored_tokens']:,.0f} tokens"
    rows: list[list[Cell]] = [
        [label(metric), formatted(metric, metrics[metric]), on_texts] for metric in OF_TEXTS
    ]
    rows.append(share("questions answered right", asked, "questions"))
    turns = [answer for answer in asked if answer.category == "multi_turn"]
    rows.append(share("of them with several turns", turns, "questions"))
    for category in sorted({a.category for a in answers if a.category.startswith(NEEDLE)}):
        found = [answer for answer in answers if answer.category == category]
        tokens = int(category.removeprefix(NEEDLE))
        rows.append(share(f"needle found in {tokens:,} tokens", found, "long prompts"))
    rows += [
        [label(metric), formatted(metric, metrics[metric]), f"{len(asked)} questions"]
        for metric in OF_ANSWERS
    ]
    rows += [
        ["time of the evaluation", f"{run['wall_time_s'] / 60:.0f} min", "everything"],
        [
            "peak memory of the evaluation",
            formatted("size_bytes", run["peak_rss_bytes"]),
            "everything",
        ],
    ]
    write_result(
        "evaluate_full",
        title="The evaluation of size full, embedded default, int4",
        columns=["figure", "value", "on"],
        rows=rows,
        notes=(
            "Shares with 95 % intervals. Peak memory of answering includes the long prompts; that "
            "of the evaluation, the full-precision reference. Measured while other programs used "
            "the same two cores: times are upper bounds."
        ),
        extra={"metrics": metrics},
    )


if __name__ == "__main__":
    main()
