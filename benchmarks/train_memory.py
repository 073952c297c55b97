"""How much memory training takes at Phi-3's shapes, and how near the estimate before it is.

    python benchmarks/train_memory.py                          # some layers of Phi-3-mini
    python benchmarks/train_memory.py --model phi-3-medium-4k --layers 1 --tokens 256

Weights are random, in the real shapes but with fewer layers, so that it fits a machine of 24 GB:
what is printed for the whole model is computed, and says so. Every run is a process of its own,
trains two steps, and is measured by the kernel: the highest resident set, and what of it is no
mapped file, which the system takes back when memory is wanted. The latter is what has to fit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _result import write_result
from random_checkpoint import MODELS, write_random_checkpoint

RUN = """
import json, random, re, sys, threading, time
from pathlib import Path
from types import SimpleNamespace
from phi3_mlflow.core.meter import peak_rss_bytes
from phi3_mlflow.training.memory import training_memory
from phi3_mlflow.training.settings import TrainSettings
from phi3_mlflow.training.train import train

checkpoint, place, tokens, settings = (json.loads(a) for a in sys.argv[1:])
draw = random.Random(0)
def row():
    ids = tuple(draw.randrange(5, 250) for _ in range(tokens))
    mask = tuple(int(place >= tokens // 2) for place in range(tokens))
    return SimpleNamespace(input_ids=ids, loss_mask=mask)
highest = 0
def watch():
    global highest
    while True:
        status = Path("/proc/self/status").read_text()
        highest = max(highest, 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", status)[1]))
        time.sleep(0.02)
threading.Thread(target=watch, daemon=True).start()
class Deaf:
    def begins(self, step, steps): pass
    def point(self, step, values): pass
chosen = TrainSettings(data="rows.jsonl", max_length=tokens, **settings)
rows = [row() for _ in range(2 * chosen.per_device_train_batch_size)]
estimate = training_memory(Path(checkpoint), chosen, tokens).total
train(Path(checkpoint), rows, (), chosen, folder=Path(place) / "work", out=Path(place),
      base_model="random", listener=Deaf())
print(json.dumps([peak_rss_bytes(), highest, estimate]))
"""


def measure(checkpoint: Path, tokens: int, **settings: object) -> tuple[int, int, int]:
    """Bytes that two steps of training take at most, with and without files, and the estimate."""
    with tempfile.TemporaryDirectory() as place:
        given = (str(checkpoint), place, tokens, settings)
        done = subprocess.run(
            [sys.executable, "-c", RUN, *map(json.dumps, given)],
            cwd=Path(__file__).resolve().parents[1],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    peak, anonymous, estimate = json.loads(done.stdout.splitlines()[-1])
    return peak, anonymous, estimate


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(MODELS), default="phi-3-mini-4k")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--lora-r", type=int, default=16)
    parser.add_argument("--name", default="train_memory", help="of the result")
    parser.add_argument("--out", type=Path, help="folder of the result")
    args = parser.parse_args()
    from phi3_mlflow.training.memory import training_memory
    from phi3_mlflow.training.settings import TrainSettings

    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for layers in args.layers:
            checkpoint = Path(temporary) / f"{layers}"
            write_random_checkpoint(args.model, checkpoint, layers=layers)
            for tokens in args.tokens:
                for checkpointing in (False, True):
                    settings = {
                        "lora_r": args.lora_r,
                        "per_device_train_batch_size": 1,
                        "gradient_checkpointing": checkpointing,
                        "save_steps": 10,
                    }
                    peak, found, estimate = measure(checkpoint, tokens, **settings)
                    print(layers, tokens, checkpointing, peak, found, estimate, flush=True)
                    figures = peak / 1e9, found / 1e9, estimate / 1e9, found / estimate
                    rows.append([layers, tokens, checkpointing, *figures])
        layers = int(MODELS[args.model]["num_hidden_layers"])
        largest = Path(temporary) / f"{max(args.layers)}"
        for tokens in (512, 1024, 2048):
            chosen = TrainSettings(
                data=Path("rows.jsonl"),
                lora_r=args.lora_r,
                per_device_train_batch_size=1,
                gradient_checkpointing=True,
            )
            estimate = training_memory(largest, chosen, tokens, layers=layers).total
            rows.append([layers, tokens, True, None, None, estimate / 1e9, None])
    write_result(
        args.name,
        f"Memory of LoRA training on a CPU (float32), {args.model}, rank {args.lora_r}, one row",
        [
            "layers",
            "tokens",
            "gradient_checkpointing",
            "peak GB",
            "without files GB",
            "estimate GB",
            "ratio",
        ],
        rows,
        notes=f"Random weights in the shapes of {args.model}. Rows without a measured figure are "
        "the estimate for the whole model, which does not fit the machine.",
        directory=args.out,
    )


if __name__ == "__main__":
    main()
