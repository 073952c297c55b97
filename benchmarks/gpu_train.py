"""Training in bfloat16 on a GPU, at a Phi-3 model's real shapes, against plain trl and peft.

    python benchmarks/gpu_train.py                # Phi-3-mini: 20 GB of disk, 30 of GPU memory
    python benchmarks/gpu_train.py --layers 8     # fewer layers, for a smaller GPU
    python benchmarks/gpu_train.py --tiny         # shows that it works, on a CPU as well

The weights are random (random_checkpoint.py), the rows are pieces of docs/ of one length, a byte a
token. Each run is a process of its own, and the two take turns; tokens per second count from the
first step, which warms up, to the last. Afterwards this project's adapter is read by PEFT and
merged by the project: the merged weights are compared with W + lora_alpha / lora_r * B A, computed
apart, and what the merged model says with what base and adapter say under PEFT.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from _result import write_result
from _train_processes import ROOT, SETTINGS, finish, start
from random_checkpoint import add_model_arguments, write_random_checkpoint

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}"
    "{{ '<|endoftext|>' if m['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{{ 'assistant: ' if add_generation_prompt else '' }}"
)
AROUND = len("user: \nassistant: ") + 1  # tokens of a row beside what is said, the end among them


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rows", type=int, default=4, help="of a batch")
    parser.add_argument("--tokens", type=int, default=1024, help="of a row")
    parser.add_argument("--runs", type=int, default=2, help="of each")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--name", default="gpu_train", help="of the result")
    parser.add_argument("--out", type=Path, help="folder of the result")
    args = parser.parse_args()
    if args.tiny:
        args.tokens = min(args.tokens, 96)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkpoint, rows = args.checkpoint or made(args, folder), rows_of(args, folder)
        runs = trained(args, checkpoint, rows, folder)
        checked = check(checkpoint, folder / "ours-0" / "adapter", folder / "merged")
    first = runs["ours"][0]
    losses = first["losses"]
    if not (all(map(math.isfinite, losses)) and losses[-1] < losses[0]):
        raise SystemExit(f"the loss does not fall: {losses}")
    same = len({run["sha256"] for run in runs["ours"]}) == 1
    write_result(
        args.name,
        f"LoRA training in bfloat16, {'a tiny model' if args.tiny else args.model}, {args.rows} x "
        f"{args.tokens:,} tokens a step" + (f", {args.layers} layers" if args.layers else ""),
        [
            "who",
            "tokens/s",
            "GPU memory at most (GB)",
            "memory at most (GB)",
            "loss, first",
            "last",
        ],
        [
            [
                name,
                statistics.median(run["speed"] for run in runs[who]),
                statistics.median(run.get("peak_gpu_bytes", 0) for run in runs[who]) / 1e9,
                statistics.median(run["peak_rss_bytes"] for run in runs[who]) / 1e9,
                runs[who][0]["losses"][0],
                runs[who][0]["losses"][-1],
            ]
            for who, name in (("ours", "this project"), ("trl", "trl and peft"))
        ],
        notes=f"{args.steps} steps, rank {SETTINGS['lora_r']}, random weights; median of "
        f"{args.runs} runs of each, in turn. Runs of this project gave "
        + ("the same adapter to the byte" if same else "adapters that differ")
        + f". Merging took {checked['merge_seconds']:.0f} s on the CPU; "
        f"{100 * checked['equal']:.4g} % of the merged weights are what W + BA gives, computed "
        f"apart, and none is further off than {checked['furthest']:.2g} of a step of bfloat16. "
        "Logits in float32 of base and adapter under PEFT, and of the merged model: "
        f"{checked['logits']:.2g} apart, in the mean and relative to their size.",
        extra={"runs": runs, "check": checked, "same_adapter": same},
        directory=args.out,
    )


def made(args: argparse.Namespace, folder: Path) -> Path:
    """A checkpoint of random weights with a template that ends an answer."""
    import torch

    checkpoint = folder / "checkpoint"
    if args.tiny:
        from tests.fixtures.tiny_phi3 import make_tiny

        return make_tiny(checkpoint)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    write_random_checkpoint(args.model, checkpoint, layers=args.layers, device=device)
    give_template(checkpoint)
    return checkpoint


def give_template(checkpoint: Path) -> None:
    """Put a chat template into a checkpoint whose answers end."""
    (checkpoint / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


def rows_of(args: argparse.Namespace, folder: Path) -> Path:
    """A file of rows of the documentation, all of one length."""
    pages = sorted((ROOT / "docs").glob("*.md"))
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    text = " ".join("".join(letter if letter.isascii() else "-" for letter in text).split())
    prompt, length = "Go on.", args.tokens - AROUND
    if args.tiny:
        length = args.tokens // 2  # its template has more around what is said
    lines = []
    for number in range(args.rows * args.steps):
        piece = text[number * length : (number + 1) * length].replace("<|", "--")
        piece = f"x{piece[1 : length - len(prompt) - 1]}x"  # white space at an end would be cut off
        lines.append(json.dumps({"prompt": prompt, "completion": piece}))
    file = folder / "rows.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def trained(
    args: argparse.Namespace, checkpoint: Path, rows: Path, folder: Path
) -> dict[str, list[dict[str, Any]]]:
    """Every run of each, with its `speed` in tokens per second."""
    settings = SETTINGS | {
        "per_device_train_batch_size": args.rows,
        "gradient_checkpointing": args.gradient_checkpointing,
        "max_length": args.tokens,
        "save_steps": args.steps,
    }
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
    for number in range(args.runs):
        for who in ("ours", "trl")[:: 1 if number % 2 == 0 else -1]:
            place = folder / f"{who}-{number}"
            job = {"checkpoint": str(checkpoint), "rows": str(rows), "settings": settings}
            told, times = finish(start(who, job | {"place": str(place)}))
            ends = {step: moment for step, moment in times if step}
            timed = told["tokens"] * (len(ends) - 1) / len(ends)
            told["speed"] = timed / (ends[max(ends)] - ends[min(ends)])
            runs[who].append(told)
            print(who, number, json.dumps(told), flush=True)
    return runs


def check(checkpoint: Path, adapter: Path, merged: Path) -> dict[str, float]:
    """Merge, and compare with what PEFT and plain arithmetic make of the same adapter."""
    import torch
    from peft import LoraConfig, PeftModel, load_peft_weights
    from transformers import AutoModelForCausalLM

    from phi3_mlflow.checkpoints.reader import CheckpointReader
    from phi3_mlflow.core.progress import no_progress
    from phi3_mlflow.runtime.adapter import key_of
    from phi3_mlflow.training.merge import merge_adapter

    merged.mkdir()
    started = time.monotonic()
    changed = merge_adapter(checkpoint, adapter, merged, no_progress).matrices
    seconds = time.monotonic() - started
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pairs, config = load_peft_weights(str(adapter), device), LoraConfig.from_pretrained(adapter)
    base, result = CheckpointReader(checkpoint), CheckpointReader(merged)
    adapted = [name for name in base if key_of(name, "A") in pairs]
    if not changed == len(adapted) == len(pairs) // 2:
        raise SystemExit(f"{changed} matrices merged, {len(adapted)} of {len(pairs)} pairs known")
    equal = count = 0
    furthest = 0.0
    for name in adapted[:4] + adapted[-4:]:
        a, b = pairs[key_of(name, "A")].float(), pairs[key_of(name, "B")].float()
        meant = base.read(name).to(device).float() + config.lora_alpha / config.r * (b @ a)
        found = result.read(name).to(device)
        equal += int((found == meant.to(found.dtype)).sum())
        count += found.numel()
        step = torch.exp2(torch.floor(torch.log2(meant.abs().clamp_min(1e-30))) - 7)
        furthest = max(furthest, float(((found.float() - meant).abs() / step).max()))
    tokens = torch.arange(5, 250, device=device)[None]
    said = []
    for folder, on_top in ((checkpoint, adapter), (merged, None)):
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
        if on_top is not None:
            model = PeftModel.from_pretrained(model, str(on_top))
        with torch.inference_mode():
            said.append(model(input_ids=tokens).logits)
        del model
    apart = float((said[0] - said[1]).norm() / said[0].norm())
    return {
        "merge_seconds": seconds,
        "equal": equal / count,
        "furthest": furthest,
        "logits": apart,
        "matrices": changed,
    }


if __name__ == "__main__":
    main()
