"""What is left of a fine-tune in int4: the task, and everything else, from base to int4.

    python benchmarks/train_quality.py BASE TRAINED --work /tmp/quality \\
        --data examples/tickets/rows --held-out examples/tickets/more_tickets.jsonl

BASE is what `fetch` left, TRAINED what `train` made of it with `--data`. The task is measured on
the rows of the data that were set aside for validation and on all rows of the held-out file: greedy
answers, right when they are the same JSON (or, for other answers, the same text). Accuracy in
general is that of the questions of the project, perplexity that of its held-out texts. KL is the
divergence from the fine-tuned model in float32, on those texts and on the held-out rows.

Beside the profile's own int4, with several shares of training rows among what it is calibrated
with, stand the usual ways: peft's merge in bfloat16, then rounding to the nearest or k_quant.

    gain kept = (int4 - base) / (full precision - base)

What was measured is kept in `measured.json` of the work folder: a run that is stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

Messages = list[dict[str, str]]
Asked = tuple[Messages, int]
"""A conversation that ends with the user, and how many tokens an answer may have."""

ANSWER_TOKENS = 64
BATCH = 8
WINDOW = 512


@dataclass(frozen=True)
class Sets:
    """What is asked."""

    rows: list[tuple[Messages, str]]
    questions: list[Any]
    texts: list[Any]
    written: list[Any]


def main() -> None:
    """The command line."""
    from _result import write_result

    args = arguments()
    training = json.loads((args.trained / "training.json").read_text(encoding="utf-8"))
    train, held = split(args.data, training["settings"])
    rows = [*held, *(split(args.held_out, {"validation_share": 0.0})[0] if args.held_out else [])]
    rows = rows[: args.rows] if args.rows else rows
    sets = load_sets(args, [(row[:-1], row[-1]["content"]) for row in rows])
    print(f"{len(train)} rows were trained on, {len(rows)} are asked", flush=True)
    found = measure_all(args, train, sets)
    if args.no_answers:
        return
    base, merged = found["base, float32"]["task"], found["fine-tuned, float32"]["task"]
    table = [
        [
            name,
            round(100 * values["task"], 1),
            None if name.endswith("float32") else kept(values["task"], base, merged),
            round(values["task_kl"], 4) if "task_kl" in values else None,
            round(100 * values["accuracy"], 1),
            round(values["perplexity"], 2),
            round(values["kl"], 4) if "kl" in values else None,
            round(values["bytes"] / 1e6, 1),
        ]
        for name, values in found.items()
    ]
    write_result(
        "train_quality",
        "What a fine-tune keeps in int4, SmolLM2-135M-Instruct in Phi-3's architecture",
        [
            "model",
            "task (%)",
            "gain kept (%)",
            "KL, task",
            "general (%)",
            "perplexity",
            "KL, general",
            "data (MB)",
        ],
        table,
        notes=(
            f"Task: {len(rows)} held-out tickets, answered greedily, right when the JSON is the "
            f"same; one answer is {100 / len(rows):.2f} points. General: {len(sets.questions)} "
            "questions. Perplexity and KL: the held-out texts; KL against the fine-tuned model in "
            f"float32. Trained on {training['train_rows']} rows, {training['epochs']:g} epochs."
        ),
        extra={"measured": found, "training": training["settings"]},
    )


def measure_all(
    args: argparse.Namespace, train: list[Messages], sets: Sets
) -> dict[str, dict[str, float]]:
    """The figures of every candidate by its name; those that are there already are kept."""
    args.work.mkdir(parents=True, exist_ok=True)
    kept_in = args.work / "measured.json"
    found = json.loads(kept_in.read_text("utf-8")) if kept_in.exists() else {}
    for name, measure in candidates(args, train, sets):
        if name not in found:
            started = time.monotonic()
            found[name] = {**measure(), "seconds": time.monotonic() - started}
            kept_in.write_text(json.dumps(found, indent=1), "utf-8")
            print(name, {k: round(v, 4) for k, v in found[name].items()}, flush=True)
    return found


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", type=Path)
    parser.add_argument("trained", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--held-out", type=Path)
    parser.add_argument("--profile", default="smollm2-135m")
    parser.add_argument("--shares", type=float, nargs="*", default=[0.0, 0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--rows", type=int, help="so many held-out rows only")
    parser.add_argument("--only", help="a part of the names of candidates beside float32")
    parser.add_argument("--no-answers", action="store_true", help="the divergences only; no table")
    parser.add_argument("--quick", action="store_true", help="the quick questions and texts only")
    return parser.parse_args()


def split(data: Path, settings: dict[str, Any]) -> tuple[list[Messages], list[Messages]]:
    """The conversations of a file that are trained on, in the order of `quantize`, and the rest."""
    from phi3_mlflow.training.data import load_training

    read = load_training(data, validation_share=settings["validation_share"])

    def said(rows: Sequence[Any]) -> list[Messages]:
        return [[{"role": m.role, "content": m.content} for m in row.messages] for row in rows]

    return said(sorted(read.train, key=lambda row: row.id)), said(read.validation)


def load_sets(args: argparse.Namespace, rows: list[tuple[Messages, str]]) -> Sets:
    """The rows, and the general sets."""
    from transformers import AutoTokenizer

    from phi3_mlflow.evaluation import datasets
    from phi3_mlflow.evaluation.items import HeldoutText

    tokenizer = AutoTokenizer.from_pretrained(args.base)
    said = [[*asked, {"role": "assistant", "content": answer}] for asked, answer in rows]
    written = [
        HeldoutText.model_validate({"id": str(i), "text": written_out(tokenizer, one)})
        for i, one in enumerate(said)
    ]
    texts = datasets.load_heldout(quick=args.quick)
    questions = datasets.load_questions(quick=args.quick)
    if args.no_answers:
        rows, questions = [], []
    return Sets(rows, questions, texts, written)


def candidates(
    args: argparse.Namespace, train: list[Messages], sets: Sets
) -> Iterator[tuple[str, Callable[[], dict[str, float]]]]:
    """The models by name, each with what measures it."""
    from phi3_mlflow.config.loading import load_profile
    from phi3_mlflow.quantization.settings import KQuantSettings, RtnSettings

    chosen: Any = load_profile(args.profile).quantization
    yield "base, float32", lambda: in_full(args, args.base, sets)
    yield "fine-tuned, float32", lambda: in_full(args, args.trained, sets)
    half = args.work / "bf16"
    ways: dict[str, Callable[[], dict[str, float]]] = {}
    for share in args.shares:
        name = f"int4 of the profile, {share:.0%} rows"
        settings = chosen.model_copy(update={"calibration_rows": share})
        ways[name] = lambda settings=settings: in_int4(args, args.trained, settings, train, sets)
    for name, settings in (("rtn", RtnSettings()), ("k_quant", KQuantSettings())):
        ways[f"merged in bfloat16, {name}"] = lambda settings=settings: in_int4(
            args, merged_in_bfloat16(args.base, args.trained, half), settings, [], sets
        )
    yield from ((n, way) for n, way in ways.items() if not args.only or args.only in n)
    shutil.rmtree(half, ignore_errors=True)


def merged_in_bfloat16(base: Path, trained: Path, out: Path) -> Path:
    """The usual way: model and adapter in bfloat16, peft's `merge_and_unload`."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if not out.exists():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        model = PeftModel.from_pretrained(model, str(trained / "adapter")).to(torch.bfloat16)
        model.merge_and_unload().save_pretrained(out)
        for file in base.iterdir():
            if not (out / file.name).exists() and file.suffix in (".json", ".jinja"):
                shutil.copy(file, out)
    return out


def in_full(args: argparse.Namespace, checkpoint: Path, sets: Sets) -> dict[str, float]:
    """Measure a checkpoint in float32."""
    found = measured(lambda asked: torch_answers(checkpoint, asked), sets)
    found["bytes"] = sum(f.stat().st_size for f in checkpoint.glob("*.safetensors"))
    return found | divergences(args, checkpoint, sets)


def in_int4(
    args: argparse.Namespace, checkpoint: Path, settings: Any, train: list[Messages], sets: Sets
) -> dict[str, float]:
    """Quantize and export a checkpoint, and measure what comes of it."""
    from phi3_mlflow.genai.export import export_onnx
    from phi3_mlflow.quantization.quantize import quantize_checkpoint

    int4, onnx = args.work / "int4", args.work / "onnx"
    for folder in (int4, onnx):
        shutil.rmtree(folder, ignore_errors=True)
    quantize_checkpoint(checkpoint, int4, settings, rows=train)
    export_onnx(int4, onnx, precision="int4", accuracy_level=settings.accuracy_level)
    found = measured(lambda asked: onnx_answers(onnx, args.base, asked), sets)
    found["bytes"] = sum(f.stat().st_size for f in onnx.glob("*.onnx.data"))
    found |= divergences(args, onnx, sets)
    shutil.rmtree(int4)
    shutil.rmtree(onnx)
    return found


def divergences(args: argparse.Namespace, model: Path, sets: Sets) -> dict[str, float]:
    """Perplexity, and KL against the fine-tuned model in float32, on texts and rows."""
    from phi3_mlflow.artifacts.cache import StepCache
    from phi3_mlflow.evaluation.measure import diverge

    found, store = {}, StepCache(args.work / "cache")
    for name, texts in (("", sets.texts), ("task_", sets.written)):
        metrics = diverge(args.trained, model, texts, WINDOW, store=store).metrics()
        found |= {f"{name}perplexity": metrics["perplexity"], f"{name}kl": metrics["kl_mean"]}
    return found


def measured(answers: Callable[[list[Asked]], list[str]], sets: Sets) -> dict[str, float]:
    """How often a model is right about the rows and the questions."""
    from phi3_mlflow.evaluation.checks import check_answer

    if not sets.rows:
        return {}
    said = answers([(messages, ANSWER_TOKENS) for messages, _ in sets.rows])
    right = [same(answer, row[1]) for answer, row in zip(said, sets.rows, strict=True)]
    asked = [([m.model_dump() for m in q.messages], q.max_tokens) for q in sets.questions]
    both = zip(sets.questions, answers(asked), strict=True)
    correct = [check_answer(question.check, answer) for question, answer in both]
    return {"task": sum(right) / len(right), "accuracy": sum(correct) / len(correct)}


def same(answer: str, wanted: str) -> bool:
    """Whether two answers are the same JSON, or the same text."""
    try:
        return bool(json.loads(answer) == json.loads(wanted))
    except ValueError:
        return answer.strip() == wanted.strip()


def torch_answers(checkpoint: Path, asked: list[Asked]) -> list[str]:
    """Greedy answers of transformers in float32, several at a time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    said = [""] * len(asked)
    order = sorted(range(len(asked)), key=lambda i: len(str(asked[i][0])))
    for start in range(0, len(order), BATCH):
        some = order[start : start + BATCH]
        batch = tokenizer(
            [written_out(tokenizer, asked[i][0]) for i in some],
            return_tensors="pt",
            padding=True,
            add_special_tokens=False,
        )
        most = max(asked[i][1] for i in some)
        with torch.inference_mode():
            out = model.generate(**batch, do_sample=False, max_new_tokens=most)
        for i, tokens in zip(some, out[:, batch["input_ids"].shape[1] :], strict=True):
            said[i] = tokenizer.decode(tokens[: asked[i][1]], skip_special_tokens=True)
    return said


def onnx_answers(onnx: Path, checkpoint: Path, asked: list[Asked]) -> list[str]:
    """Greedy answers of onnxruntime-genai."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime_genai as og
    from transformers import AutoTokenizer

    from phi3_mlflow.core.machine import usable_cores

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    config = og.Config(str(onnx))
    options = {"intra_op_num_threads": usable_cores()}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    model = og.Model(config)
    said = []
    for messages, most in asked:
        prompt = tokenizer(written_out(tokenizer, messages), add_special_tokens=False)["input_ids"]
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(prompt) + most, do_sample=False)
        generator = og.Generator(model, params)
        generator.append_tokens(prompt)
        while not generator.is_done():
            generator.generate_next_token()
        tokens = list(generator.get_sequence(0))[len(prompt) :]
        said.append(str(tokenizer.decode(tokens, skip_special_tokens=True)))
    return said


def written_out(tokenizer: Any, messages: Messages) -> str:
    """A conversation as the model reads it, up to where it answers, or the whole of it."""
    asks = messages[-1]["role"] == "user"
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks))


def kept(int4: float, base: float, merged: float) -> float | None:
    """The share of the gain that is left, in percent; None where there was no gain."""
    return round(100 * (int4 - base) / (merged - base), 1) if merged > base else None


if __name__ == "__main__":
    main()
