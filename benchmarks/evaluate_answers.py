"""Answers of full precision, layer by layer, compared with transformers in float32.

    python benchmarks/evaluate_answers.py [CHECKPOINT]
    python benchmarks/evaluate_answers.py --model phi-3-mini-4k --layers 4 --questions 12

Without an argument the checkpoint is what `fetch` left for the embedded default, and the questions
are the quick ones of the evaluation. `--model` writes random weights in a model's real shapes first
(`--layers`: fewer of its layers, `--work`: where). Each way answers the same questions in a process
of its own: transformers with the model as a whole, in the batches of the evaluation, then the
project's way through its layers; `--transformers none` leaves the first out, for models that do not
fit. Peak memory is the largest resident set, libraries included. What a random model says is noise,
and the two ways may differ where two tokens are as likely as one another; how long it takes is not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from _result import Cell, write_result  # noqa: E402
from evaluate_streamed import default_checkpoint  # noqa: E402
from random_checkpoint import MODELS, write_random_checkpoint  # noqa: E402

_WAY = """
import json, sys
from pathlib import Path
from phi3_mlflow.core.meter import ResourceMeter
from phi3_mlflow.core.progress import show_progress
from phi3_mlflow.evaluation import datasets, reference
from phi3_mlflow.evaluation.streamed_answers import answer_streamed

checkpoint, way = Path(sys.argv[1]), sys.argv[2]
count, limit = int(sys.argv[3]), int(sys.argv[4])
questions = datasets.load_questions(None, quick=True)[: count or None]
if limit:
    questions = [one.model_copy(update={"max_tokens": limit}) for one in questions]
meter = ResourceMeter()
with show_progress(way, len(questions), "answered") as bar:
    if way == "transformers":
        answers = reference._answer_in_memory(checkpoint, questions, bar, reference.BATCH_TOKENS)
    else:
        answers = answer_streamed(checkpoint, questions, bar)
told = [[one.text, one.completion_tokens, one.finish_reason] for one in answers]
prompts = sum(one.prompt_tokens for one in answers)
print(json.dumps({**meter.figures(), "answers": told, "prompts": prompts}))
"""


def run(checkpoint: Path, way: str, count: int, limit: int) -> dict[str, Any]:
    """The figures of one way, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", _WAY, str(checkpoint), way, str(count), str(limit)],
        stdout=subprocess.PIPE, text=True, check=True,
        env=os.environ | {"TRANSFORMERS_VERBOSITY": "error", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--model", choices=sorted(MODELS), help="random weights in its shapes")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--questions", type=int, default=0, help="the first so many; 0: all")
    parser.add_argument("--max-tokens", type=int, default=0, help="of each answer; 0: its own")
    parser.add_argument("--transformers", choices=["float32", "none"], default="float32")
    parser.add_argument("--work", type=Path, help="where random weights are written")
    parser.add_argument("--name", default="evaluate_answers")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        checkpoint = args.checkpoint
        if args.model:
            checkpoint = Path(folder, args.model)
            write_random_checkpoint(args.model, checkpoint, layers=args.layers)
        checkpoint = (checkpoint or default_checkpoint()).resolve()
        ways = ["layer by layer"]
        if args.transformers != "none":
            ways.insert(0, "transformers")
        found = {way: run(checkpoint, way, args.questions, args.max_tokens) for way in ways}
        weights = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    rows: list[list[Cell]] = []
    answers = {way: figures["answers"] for way, figures in found.items()}
    first = answers[ways[0]]
    for way, figures in found.items():
        seconds, made = figures["wall_time_s"], sum(one[1] for one in answers[way])
        equal = sum(one == other for one, other in zip(answers[way], first, strict=True))
        peak = figures["peak_rss_bytes"] / 1e9
        read = figures.get("bytes_read", 0) / 1e9
        rows.append([way, seconds, peak, read, made, made / seconds, f"{equal} of {len(first)}"])
    what = f"{args.model}, {args.layers or 'all'} layers, random" if args.model else "the default"
    write_result(
        args.name,
        title=f"Full precision answers {len(first)} questions: {what}, {weights / 1e9:.2f} GB",
        columns=[
            "way", "seconds", "peak RSS (GB)", "read (GB)", "tokens of answers", "tokens/s",
            "equal answers",
        ],
        rows=rows,
        notes=(
            f"{found[ways[0]]['prompts']} tokens of prompts; greedy, in float32, each way in a "
            "process of its own with importing and loading; GB is 10^9 bytes. Bytes read went "
            "through read calls, mostly from the system's cache of files."
        ),
    )  # fmt: skip


if __name__ == "__main__":
    main()
