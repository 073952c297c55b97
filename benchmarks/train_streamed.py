"""Memory and time of the streamed engine, beside peft with the model in memory, at Phi-3's shapes.

    python benchmarks/train_streamed.py                               # both, with some layers
    python benchmarks/train_streamed.py --whole                       # and streamed with all layers
    python benchmarks/train_streamed.py --layers 1 --tokens 128       # shows that it works

Weights are random. Each run is a process of its own and takes steps of the same rows with the same
settings; the two take turns. Memory is the highest resident set; seconds are of a step after the
first. peft is plain peft with transformers and AdamW, once with gradient checkpointing and once
without, with nothing of this project.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _result import Cell, write_result
from random_checkpoint import MODELS, write_random_checkpoint

# Rows of one length, of which the second half carries loss.
ROWS = """
import json, random, sys, time
checkpoint, place, tokens, rows, steps, rank, threads = (json.loads(a) for a in sys.argv[1:])
draw = random.Random(0)
every = [[draw.randrange(5, 250) for _ in range(tokens)] for _ in range(rows * steps)]
"""
STREAMED = """
from pathlib import Path
from types import SimpleNamespace
from phi3_mlflow.core.meter import peak_rss_bytes
from phi3_mlflow.training.memory import streamed_memory
from phi3_mlflow.training.settings import TrainSettings
from phi3_mlflow.training.streamed import train

mask = [int(place >= tokens // 2) for place in range(tokens)]
every = [SimpleNamespace(input_ids=tuple(ids), loss_mask=tuple(mask)) for ids in every]
times, losses = [], []
class Clock:
    def begins(self, step, steps): times.append(time.monotonic())
    def point(self, step, values):
        times.append(time.monotonic())
        losses.append(values["loss"])
chosen = TrainSettings(
    data="rows.jsonl", engine="streamed", max_length=tokens, per_device_train_batch_size=rows,
    lora_r=rank, threads=threads, save_steps=1000000,
)
estimate = streamed_memory(Path(checkpoint), chosen, tokens).total
train(Path(checkpoint), every, (), chosen, folder=Path(place) / "work", out=Path(place),
      base_model="random", listener=Clock())
"""
PEFT = """
import resource, torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

torch.set_num_threads(threads)
model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
model = get_peft_model(model, LoraConfig(
    r=rank, lora_alpha=32, target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    task_type="CAUSAL_LM",
))
if CHECKPOINTING:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
model.train()
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=2e-4)
times, losses, estimate = [time.monotonic()], [], None
for start in range(0, len(every), rows):
    ids = torch.tensor(every[start:start + rows])
    labels = ids.clone()
    labels[:, :tokens // 2] = -100
    loss = model(input_ids=ids, labels=labels, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    times.append(time.monotonic())
    losses.append(loss.item())
def peak_rss_bytes(): return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
"""
TOLD = """
seconds = [after - before for before, after in zip(times, times[1:])]
print(json.dumps([peak_rss_bytes(), seconds, losses, estimate]))
"""
WAYS = {
    "streamed": ROWS + STREAMED + TOLD,
    "peft, gradient_checkpointing": ROWS + PEFT.replace("CHECKPOINTING", "True") + TOLD,
    "peft": ROWS + PEFT.replace("CHECKPOINTING", "False") + TOLD,
}


def measure(way: str, checkpoint: Path, args: argparse.Namespace) -> dict[str, object]:
    """What a process of its own needs for some steps."""
    with tempfile.TemporaryDirectory(dir=args.work) as place:
        given = [str(checkpoint), place, args.tokens, args.rows, args.steps, args.lora_r]
        done = subprocess.run(
            [sys.executable, "-c", WAYS[way], *map(json.dumps, [*given, args.threads])],
            cwd=Path(__file__).resolve().parents[1],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    peak, seconds, losses, estimate = json.loads(done.stdout.splitlines()[-1])
    print(way, f"{peak / 1e9:.2f} GB", [f"{one:.1f} s" for one in seconds], losses, flush=True)
    return {"peak": peak, "seconds": seconds[1:], "first_loss": losses[0], "estimate": estimate}


def row(way: str, layers: int, found: list[dict]) -> list[Cell]:
    """A line of the table: medians over the runs."""
    seconds = statistics.median(second for run in found for second in run["seconds"])
    peak = statistics.median(run["peak"] for run in found)
    estimate = found[0]["estimate"]
    return [way, layers, peak / 1e9, estimate and estimate / 1e9, seconds]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(MODELS), default="phi-3-mini-4k")
    parser.add_argument("--layers", type=int, default=2, help="of what both engines train")
    parser.add_argument("--whole", action="store_true", help="streamed with all layers besides")
    parser.add_argument("--tokens", type=int, default=512, help="of a row")
    parser.add_argument("--rows", type=int, default=8, help="of a step")
    parser.add_argument("--steps", type=int, default=3, help="of a run; the first is not timed")
    parser.add_argument("--runs", type=int, default=1, help="of each way")
    parser.add_argument("--lora-r", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="folder for checkpoints, on a roomy disk")
    parser.add_argument("--name", default="train_streamed", help="of the result")
    parser.add_argument("--out", type=Path, help="folder of the result")
    args = parser.parse_args()
    if args.steps < 2:
        parser.error("--steps: at least 2, the first is not timed")
    with tempfile.TemporaryDirectory(dir=args.work) as temporary:
        checkpoint = Path(temporary) / "some"
        write_random_checkpoint(args.model, checkpoint, layers=args.layers)
        found: dict[str, list[dict]] = {way: [] for way in WAYS}
        for number in range(args.runs):
            for way in list(WAYS)[:: 1 if number % 2 == 0 else -1]:
                found[way].append(measure(way, checkpoint, args))
        rows = [row(way, args.layers, runs) for way, runs in found.items()]
        losses = [runs[0]["first_loss"] for runs in found.values()]
        if max(losses) - min(losses) > 1e-3 * max(losses):
            raise SystemExit(f"the ways did not compute the same: first losses {losses}")
        if args.whole:
            checkpoint = Path(temporary) / "whole"
            write_random_checkpoint(args.model, checkpoint)
            layers = int(MODELS[args.model]["num_hidden_layers"])
            rows.append(row("streamed", layers, [measure("streamed", checkpoint, args)]))
    write_result(
        args.name,
        f"LoRA training of {args.model} on a CPU, {args.rows} x {args.tokens} tokens a step, "
        f"rank {args.lora_r}, {args.threads} threads",
        ["way", "layers", "peak GB", "estimate GB", "seconds a step"],
        rows,
        notes=f"Random weights in the shapes of {args.model}. Half of the tokens carry loss. Peak "
        "is the highest resident set of the process; seconds are the median of the steps after "
        f"the first, of {args.runs} runs.",
        extra={"runs": found},
        directory=args.out,
    )


if __name__ == "__main__":
    main()
