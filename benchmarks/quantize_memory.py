"""Peak memory and wall time from a full-size checkpoint to int4 ONNX, one process a step.

    python benchmarks/random_checkpoint.py phi-3-mini-4k /tmp/random-phi3
    python benchmarks/quantize_memory.py /tmp/random-phi3 --work /tmp/quantize-memory
    python benchmarks/quantize_memory.py /tmp/random-phi3 --work /tmp/quantize-memory --stock
    python benchmarks/quantize_memory.py /tmp/random-phi3 --work /tmp/quantize-memory \\
        --algorithms rtn --olive-python VENV/bin/python --name quantize_memory_olive

`--stock` also runs onnxruntime-genai's own builder on the quantized checkpoint and on the float
one, each under a limit of address space (`--limit-gb`), so that it fails instead of taking the
machine down. `--olive-python` names a Python of another environment with olive-ai: Olive 0.13 calls
onnxruntime-genai's builder as it was up to 0.12, and fails with that of 0.15 and 0.18. Peak memory
is the process's largest resident set (`ru_maxrss`).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

_QUANTIZE = """
from pathlib import Path
from phi3_mlflow.quantization.quantize import quantize_checkpoint
from phi3_mlflow.quantization.settings import quantization_settings
settings = quantization_settings({settings!r})
unfinished = Path({out!r} + "-unfinished")
unfinished.mkdir(parents=True, exist_ok=True)
print(quantize_checkpoint(Path({source!r}), Path({out!r}), settings, unfinished=unfinished))
"""
_EXPORT = """
from pathlib import Path
from phi3_mlflow.genai.export import export_onnx
print(export_onnx(Path({source!r}), Path({out!r}), precision="int4"))
"""
_STOCK = """
from onnxruntime_genai.models.builder import create_model, parse_extra_options
source, out = {source!r}, {out!r}
options = parse_extra_options("", source, out, "int4", "cpu", out + ".cache", {options!r})
create_model("", source, out, "int4", "cpu", out + ".cache", **options)
"""
_OLIVE = """
from olive.workflows import run
source, out = {source!r}, {out!r}
rounding = {{"type": "Rtn", "bits": 4, "group_size": 32, "sym": True}}
builder = {{"type": "ModelBuilder", "precision": "int4", "extra_options": {{"accuracy_level": 4}}}}
done = run({{"input_model": {{"type": "HfModel", "model_path": source}}, "output_dir": out,
            "passes": {{"q": rounding, "b": builder}}, "cache_dir": out + "-cache"}})
assert done.has_output_model(), "Olive made no model"
"""


def run(code: str, limit_gb: float, python: str = sys.executable) -> tuple[float, float, int, str]:
    """Run Python code in a process of its own.

    Returns:
        Seconds, peak resident memory in GB, the exit status, and the last line of its errors.
    """
    limit = int(limit_gb * 1e9)
    started = time.monotonic()
    wrapper = (
        "import resource, sys\n"
        + code
        + ("\nprint('PEAK', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)\n")
    )
    done = subprocess.run(
        [python, "-c", wrapper],
        cwd=ROOT,
        env=os.environ | {"OLIVE_DISABLE_TELEMETRY": "1"},
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    seconds = time.monotonic() - started
    lines = done.stderr.strip().splitlines()
    peaks = [line for line in lines if line.startswith("PEAK ")]
    peak = int(peaks[-1].split()[1]) * 1024 / 1e9 if peaks else float("nan")
    return seconds, peak, done.returncode, lines[-1] if lines else ""


def main() -> None:
    """The command line."""
    from _result import write_result

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="a directory for the outputs")
    parser.add_argument("--algorithms", default="rtn,k_quant_mixed")
    parser.add_argument("--calibration-tokens", type=int, default=16384, help="of gptq")
    parser.add_argument("--limit-gb", type=float, default=20.0)
    parser.add_argument("--stock", action="store_true")
    parser.add_argument("--olive-python", type=Path, help="a Python that has olive-ai")
    parser.add_argument("--name", default="quantize_memory", help="of the result file")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    rows: list[list[str | int | float | bool | None]] = []
    weights = sum(f.stat().st_size for f in args.checkpoint.glob("*.safetensors"))
    source = str(args.checkpoint.resolve())

    def step(what: str, code: str, out: Path, python: str = sys.executable) -> bool:
        seconds, peak, status, last = run(code, args.limit_gb, python)
        data = out / "model.onnx.data"
        files = [data] if data.exists() else list(out.glob("*.safetensors"))
        size = sum(f.stat().st_size for f in files) / 1e9 if status == 0 else None
        outcome = "done" if status == 0 else f"failed: {last[:60]}"
        rows.append(
            [what, None if peak != peak else round(peak, 2), round(seconds, 1), size, outcome]
        )
        print(rows[-1], flush=True)
        return status == 0

    for algorithm in args.algorithms.split(","):
        int4, onnx = args.work / f"{algorithm}-int4", args.work / f"{algorithm}-onnx"
        settings: dict[str, Any] = {"algorithm": algorithm}
        what = algorithm
        if algorithm == "gptq":
            settings["calibration"] = str(ROOT / "data" / "calibration.jsonl")
            settings["calibration_tokens"] = args.calibration_tokens
            what = f"gptq, {args.calibration_tokens:,} calibration tokens"
        if step(
            f"quantize, {what}",
            _QUANTIZE.format(settings=settings, source=source, out=str(int4)),
            int4,
        ):
            step(f"export, {what}", _EXPORT.format(source=str(int4), out=str(onnx)), onnx)
        if args.stock and algorithm == args.algorithms.split(",")[0]:
            out = args.work / "stock"
            code = _STOCK.format(source=str(int4), out=str(out), options=["accuracy_level=4"])
            step("stock builder, from that checkpoint", code, out)
            shutil.rmtree(out, ignore_errors=True)
            code = _STOCK.format(source=source, out=str(out), options=["accuracy_level=4"])
            step(f"stock builder, from bf16, limit {args.limit_gb:g} GB", code, out)
            shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(int4, ignore_errors=True)
        shutil.rmtree(f"{int4}-unfinished", ignore_errors=True)
        shutil.rmtree(onnx, ignore_errors=True)
    if args.olive_python is not None:
        out = args.work / "olive"
        code = _OLIVE.format(source=source, out=str(out))
        what = f"Olive, Rtn and ModelBuilder, limit {args.limit_gb:g} GB"
        step(what, code, out, str(args.olive_python))
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(f"{out}-cache", ignore_errors=True)
    config = json.loads((args.checkpoint / "config.json").read_text(encoding="utf-8"))
    write_result(
        args.name,
        f"Memory and time to int4 ONNX, {weights / 1e9:.2f} GB of bf16 weights, "
        f"{config['num_hidden_layers']} layers",
        ["step", "peak RSS (GB)", "seconds", "output (GB)", "outcome"],
        rows,
        notes="Each step in a process of its own; GB is 10^9 bytes. Random weights.",
    )


if __name__ == "__main__":
    main()
