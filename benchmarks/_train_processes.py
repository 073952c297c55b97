"""One training run in a process of its own, by this project or by trl and peft alone.

    python benchmarks/_train_processes.py ours '{"checkpoint": ..., "rows": ..., "place": ...}'

Prints `begin TIME`, `step N TIME` for every step and at the end `done JSON`. Used by train_kills.py
and train_speed.py, which give both the same settings.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SETTINGS: dict[str, Any] = {
    "learning_rate": 5e-4,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "warmup_ratio": 0.03,
    "save_steps": 5,
    "threads": 2,
    "gradient_checkpointing": False,
}


def start(who: str, job: dict[str, Any], **streams: Any) -> subprocess.Popen[str]:
    """Start a run.

    Args:
        who: `ours` or `trl`.
        job: `checkpoint`, `rows` (a file of prompt and completion), `place` (a folder of the
            run's), and `settings`.
        streams: of the process.
    """
    return subprocess.Popen(
        [sys.executable, __file__, who, json.dumps(job)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
        **streams,
    )


def finish(process: subprocess.Popen[str]) -> tuple[dict[str, Any], list[tuple[int, float]]]:
    """What a run says at its end, and when each step ended, in seconds; step 0 is the beginning."""
    assert process.stdout is not None
    times: list[tuple[int, float]] = []
    told: dict[str, Any] = {}
    for line in process.stdout:
        word, _, rest = line.partition(" ")
        if word == "begin":
            times.append((0, float(rest)))
        elif word == "step":
            number, _, moment = rest.partition(" ")
            times.append((int(number), float(moment)))
        elif word == "done":
            told = json.loads(rest)
    if process.wait() != 0:
        raise RuntimeError(f"the run ended with {process.returncode}")
    return told, times


def say(*words: object) -> None:
    """Tell the process that reads."""
    print(*words, flush=True)


class _Listener:
    def begins(self, step: int, steps: int) -> None:
        say("begin", time.monotonic())

    def point(self, step: int, values: dict[str, float]) -> None:
        if "loss" in values:
            say("step", step, time.monotonic())


def ours(job: dict[str, Any]) -> dict[str, Any]:
    """The project's training, as the step runs it."""
    from phi3_mlflow.training.data import load_training
    from phi3_mlflow.training.masking import tokenize_rows
    from phi3_mlflow.training.settings import TrainSettings
    from phi3_mlflow.training.train import train

    checkpoint, place = Path(job["checkpoint"]), Path(job["place"])
    chosen = TrainSettings(data=Path(job["rows"]), **job["settings"])
    data = load_training(Path(job["rows"]), validation_share=0)
    rows = tokenize_rows(checkpoint, data.train, max_length=chosen.max_length)
    out = place / "adapter"
    out.mkdir(parents=True, exist_ok=True)
    trained = train(
        checkpoint, rows.rows, (), chosen,
        folder=place / "run", out=out, base_model="none", listener=_Listener(),
    )  # fmt: skip
    losses = [point["loss"] for point in trained.curve if "loss" in point]
    tokens = rows.tokens * chosen.num_train_epochs
    return {"sha256": trained.adapter_sha256, "tokens": tokens, "losses": losses}


def trl(job: dict[str, Any]) -> dict[str, Any]:
    """The same as a script of trl's documentation would do it; on a GPU in bfloat16."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from transformers.trainer_utils import get_last_checkpoint
    from trl import SFTConfig, SFTTrainer

    chosen, place = job["settings"], Path(job["place"])
    torch.set_num_threads(chosen["threads"])
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    rows = []
    for line in Path(job["rows"]).read_text("utf-8").splitlines():
        row = json.loads(line)
        said = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        said.append({"role": "user", "content": row["prompt"]})
        answer = [{"role": "assistant", "content": row["completion"]}]
        rows.append({"prompt": said, "completion": answer})

    class Tell(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            say("begin", time.monotonic())

        def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            say("step", state.global_step, time.monotonic())

    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(job["checkpoint"], dtype=dtype),
        args=SFTConfig(
            output_dir=str(place / "run"),
            learning_rate=chosen["learning_rate"],
            num_train_epochs=chosen["num_train_epochs"],
            per_device_train_batch_size=chosen["per_device_train_batch_size"],
            gradient_accumulation_steps=chosen["gradient_accumulation_steps"],
            gradient_checkpointing=chosen["gradient_checkpointing"],
            warmup_steps=chosen["warmup_ratio"],
            lr_scheduler_type="cosine",
            save_steps=chosen["save_steps"],
            save_total_limit=2,
            logging_steps=1,
            seed=0,
            max_length=1024,
            completion_only_loss=True,
            report_to="none",
            disable_tqdm=True,
            use_cpu=not on_gpu,
            bf16=on_gpu,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(job["checkpoint"]),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM",
            r=chosen["lora_r"],
            lora_alpha=chosen["lora_alpha"],
            lora_dropout=chosen["lora_dropout"],
            target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
        ),
        callbacks=[Tell()],
    )
    tokens = sum(map(len, trainer.train_dataset["input_ids"])) * chosen["num_train_epochs"]
    run = place / "run"
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(run)) if run.is_dir() else None)
    trainer.save_model(str(place / "adapter"))
    content = (place / "adapter" / "adapter_model.safetensors").read_bytes()
    losses = [point["loss"] for point in trainer.state.log_history if "loss" in point]
    return {"sha256": hashlib.sha256(content).hexdigest(), "tokens": tokens, "losses": losses}


def checkpoint_of(args: Any, folder: Path) -> Path:
    """The checkpoint that the command line names: a tiny one, or a folder."""
    if args.tiny:
        from tests.fixtures.tiny_phi3 import make_tiny

        return make_tiny(folder / "checkpoint", "phi-4-mini")
    if args.checkpoint is not None:
        return Path(args.checkpoint)
    from phi3_mlflow.artifacts.cache import StepCache

    entry = StepCache().latest("smollm2-135m", "fetch")
    if entry is None:
        sys.exit("Run  python -m steps.fetch  first, or give --checkpoint or --tiny.")
    return entry.path


def rows_of(args: Any, folder: Path) -> Path:
    """A file with as many of the example's rows as the command line asks for."""
    lines = (
        (ROOT / "examples" / "tickets" / "rows" / "tickets.jsonl").read_text("utf-8").splitlines()
    )
    rows = []
    for line in lines[: args.rows]:
        *before, asked, answered = json.loads(line)["messages"]
        row = {"prompt": asked["content"], "completion": answered["content"]}
        rows.append(row | ({"system": before[0]["content"]} if before else {}))
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


def main() -> None:
    """The process of one run."""
    from phi3_mlflow.core.meter import peak_rss_bytes

    told = {"ours": ours, "trl": trl}[sys.argv[1]](json.loads(sys.argv[2]))
    torch = sys.modules["torch"]
    if torch.cuda.is_available():
        told["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
    say("done", json.dumps(told | {"peak_rss_bytes": peak_rss_bytes()}))


if __name__ == "__main__":
    main()
