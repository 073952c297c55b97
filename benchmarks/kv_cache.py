"""Keys and values in float32 and in int8: what the model says, how fast, in how much memory.

    python benchmarks/kv_cache.py CHECKPOINT                              # the default, as fetched
    python benchmarks/kv_cache.py CHECKPOINT --algorithm rtn --no-quality # random weights, any size

Both graphs are exported from the same int4 weights. Speed and memory are those of one process for
each, which reads a prompt of so many tokens in pieces of 64, as `predict` does, and then writes 32
more, one by one; the two take turns. Quality is measured on the held-out texts, against CHECKPOINT.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from _result import Cell, write_result  # noqa: E402

RUN = """
import json, random, sys, time
from pathlib import Path
from phi3_mlflow.core.meter import peak_rss_bytes
from phi3_mlflow.flavors.onnx import rope_switch
from phi3_mlflow.genai.kept import kv_cache
from phi3_mlflow.runtime.engine import EngineSettings
from phi3_mlflow.runtime.engine_genai import GenaiEngine

folder, count = Path(sys.argv[1]), int(sys.argv[2])
settings = EngineSettings(rope_switch=rope_switch(folder), kv_cache=kv_cache(folder))
engine = GenaiEngine(folder, settings)
draw = random.Random(0)
tokens = [draw.randrange(5, 250) for _ in range(count)]
session = engine.open(count + 40)
start = time.monotonic()
for begin in range(0, count, 64):
    session.extend(tokens[begin:begin + 64])
read = time.monotonic() - start
token = session.follow(None)
start = time.monotonic()
for _ in range(32):
    token = session.follow(token)
print(json.dumps([count / read, 32 / (time.monotonic() - start), peak_rss_bytes()]))
"""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--profile", default="smollm2-135m")
    parser.add_argument("--algorithm", choices=("profile", "rtn"), default="profile")
    parser.add_argument("--no-quality", action="store_true", help="speed and memory only")
    parser.add_argument("--quick", action="store_true", help="the quick texts only")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 1024, 4000])
    parser.add_argument("--runs", type=int, default=3, help="of each")
    parser.add_argument("--work", type=Path, help="folder for the models; kept, and found again")
    parser.add_argument("--name", default="kv_cache", help="of the result")
    parser.add_argument("--out", type=Path, help="folder of the result")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        folders = exported(args, work)
        qualities = {} if args.no_quality else quality(args, folders, work)
        rows: list[list[Cell]] = []
        for tokens in args.tokens:
            found: dict[str, list[list[float]]] = {name: [] for name in folders}
            for number in range(args.runs):
                for name in list(folders)[:: 1 if number % 2 == 0 else -1]:
                    found[name].append(timed(folders[name], tokens))
                    print(tokens, name, found[name][-1], flush=True)
            for name, runs in found.items():
                read, written, peak = map(statistics.median, zip(*runs, strict=True))
                rows.append([name, tokens, read, written, peak / 1e9, *qualities.get(name, [])])
    measured = [] if args.no_quality else ["KL, nats", "same likeliest token (%)", "perplexity"]
    write_result(
        args.name,
        f"Keys and values in float32 and in int8: {args.profile}, int4 weights",
        ["kept as", "prompt tokens", "read, tokens/s", "written, tokens/s", "peak GB", *measured],
        rows,
        notes=f"Median of {args.runs} processes of each, in turn. KL and the likeliest token: "
        "against full precision, on the held-out texts."
        if measured
        else f"Median of {args.runs} processes of each, in turn. Random weights.",
        directory=args.out,
    )


def exported(args: argparse.Namespace, work: Path) -> dict[str, Path]:
    """Both graphs, of the same weights."""
    from phi3_mlflow.config.loading import CALIBRATION, load_profile
    from phi3_mlflow.genai.export import export_onnx
    from phi3_mlflow.quantization.calibration import calibration_sequences
    from phi3_mlflow.quantization.quantize import quantize_checkpoint
    from phi3_mlflow.quantization.settings import GptqSettings, RtnSettings

    profile = load_profile(args.profile)
    chosen = RtnSettings() if args.algorithm == "rtn" else profile.quantization
    folders = {name: work / name for name in ("float32", "int8")}
    if not (work / "int4").is_dir():
        quantize_checkpoint(args.checkpoint, work / "int4", chosen)
    read = GptqSettings(calibration=CALIBRATION, calibration_tokens=8192)
    for name, folder in folders.items():
        if not (folder / "genai_config.json").is_file():
            texts = calibration_sequences(work / "int4", read).tolist() if name == "int8" else ()
            export_onnx(work / "int4", folder, precision="int4", kv_sequences=texts)
    return folders


def quality(
    args: argparse.Namespace, folders: dict[str, Path], work: Path
) -> dict[str, list[Cell]]:
    """KL, agreement in percent and perplexity of each, on the held-out texts."""
    from phi3_mlflow.artifacts.cache import StepCache
    from phi3_mlflow.evaluation.datasets import load_heldout
    from phi3_mlflow.evaluation.measure import diverge

    store, texts = StepCache(work / "cache"), load_heldout(quick=args.quick)
    found: dict[str, list[Cell]] = {}
    for name, folder in folders.items():
        metrics = diverge(args.checkpoint, folder, texts, 512, store=store).metrics()
        agreement = 100 * metrics["top1_agreement"]
        found[name] = [metrics["kl_mean"], agreement, metrics["perplexity"]]
        print(name, found[name], flush=True)
    return found


def timed(folder: Path, tokens: int) -> list[float]:
    """Tokens read and written per second, and peak memory in bytes."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(folder), str(tokens)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    values: list[float] = json.loads(done.stdout.splitlines()[-1])
    return values


if __name__ == "__main__":
    main()
