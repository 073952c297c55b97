"""Reading and writing tokens on a GPU, against what the card's memory allows.

    python benchmarks/gpu_decode.py                      # Phi-3-mini: 20 GB of disk
    python benchmarks/gpu_decode.py --layers 8           # fewer layers
    python benchmarks/gpu_decode.py --tiny               # shows that it works, on a CPU as well

To write a token, every weight has to be read once, all but the embedding, of which it is one row:
bytes over bandwidth is the limit. The bandwidth is that of a large copy on the card, bytes read and
bytes written. The weights are random (random_checkpoint.py). Each row is a process of its own that
reads a prompt in one piece and then writes 64 tokens, five times; the median counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from _result import Cell, write_result  # noqa: E402
from gpu_train import made  # noqa: E402
from random_checkpoint import add_model_arguments  # noqa: E402

WRITTEN = 64
RUNS = 5
NAMES = {
    "torch": "transformers flavor, bfloat16",
    "generate": "transformers' own generate(), bfloat16",
    "onnx": "onnx flavor, int4, exported for cuda",
    "genai": "onnxruntime-genai's own loop, the same model",
    "onnx-cpu": "onnx flavor, int4, exported for the CPU",
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    parser.add_argument("--onnx", type=Path, help="folder of models exported before; or for them")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024], help="of the prompt")
    parser.add_argument("--who", nargs="+", choices=list(NAMES), default=list(NAMES))
    parser.add_argument("--name", default="gpu_decode", help="of the result")
    parser.add_argument("--out", type=Path, help="folder of the result")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        who, folder, tokens = args.measure
        print(json.dumps(measure(who, Path(folder), int(tokens))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkpoint = args.checkpoint or made(args, folder)
        exported = args.onnx or folder
        speed = bandwidth()
        rows: list[list[Cell]] = []
        extra: dict[str, Any] = {"bandwidth": speed}
        for who in args.who:
            place = checkpoint
            if who in ("onnx", "genai", "onnx-cpu"):
                place = export(checkpoint, exported, "cpu" if who == "onnx-cpu" else "cuda")
            for tokens in args.tokens:
                found = measured(who, place, 24 if args.tiny else tokens)
                extra[f"{who} {tokens}"] = found
                if "failed" in found:
                    continue
                limit = speed / found["bytes"]
                read, written = (statistics.median(found[key]) for key in ("read", "written"))
                share = 100 * written / limit
                rows.append([NAMES[who], tokens, read, written, limit, share])
    write_result(
        args.name,
        f"Tokens on a GPU: {'a tiny model' if args.tiny else args.model}, random weights"
        + (f", {args.layers} layers" if args.layers else ""),
        [
            "what",
            "prompt tokens",
            "read, tokens/s",
            "written, tokens/s",
            "memory allows",
            "of that (%)",
        ],
        rows,
        notes=f"A copy on the card moves {speed / 1e12:.2f} TB/s, read and written. {WRITTEN} "
        f"tokens written, median of {RUNS}.",
        extra=extra,
        directory=args.out,
    )


def bandwidth() -> float:
    """Bytes per second that a large copy reads and writes on the GPU; without one, in memory."""
    import torch

    on_gpu = torch.cuda.is_available()
    size, times = (1 << 32, 20) if on_gpu else (1 << 27, 3)
    source = torch.ones(size, dtype=torch.uint8, device="cuda" if on_gpu else "cpu")
    target = torch.empty_like(source)
    target.copy_(source)
    _wait()
    started = time.perf_counter()
    for _ in range(times):
        target.copy_(source)
    _wait()
    return 2 * size * times / (time.perf_counter() - started)


def _wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def export(checkpoint: Path, folder: Path, provider: str) -> Path:
    """The int4 ONNX model for `cpu` or `cuda`, made if it is not there."""
    from phi3_mlflow.genai.check import check_export
    from phi3_mlflow.genai.export import export_onnx
    from phi3_mlflow.quantization.quantize import quantize_checkpoint
    from phi3_mlflow.quantization.settings import RtnSettings

    out = folder / provider
    if not (out / "genai_config.json").is_file():
        if not (folder / "int4" / "config.json").is_file():
            quantize_checkpoint(checkpoint, folder / "int4", RtnSettings())
        export_onnx(folder / "int4", out, precision="int4", provider=provider)
        print(check_export(out, RtnSettings()), flush=True)
    return out


def measured(who: str, folder: Path, tokens: int) -> dict[str, Any]:
    """What a process of its own measured."""
    command = [sys.executable, __file__, "--measure", who, str(folder), str(tokens)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        found: dict[str, Any] = {"failed": done.returncode}
    else:
        found = json.loads(done.stdout.splitlines()[-1])
    print(who, tokens, found, flush=True)
    return found


def measure(who: str, folder: Path, count: int) -> dict[str, Any]:
    """Tokens read and written per second in each run, bytes of weights that a token takes."""
    import torch

    tokens = [5 + (7 * i) % 200 for i in range(count)]
    kind = _Genai if who == "genai" else _Generate if who == "generate" else _Engine
    runner = kind(folder, "cuda" if torch.cuda.is_available() else "cpu")
    read, written = [], []
    for number in range(RUNS + 1):
        started = time.perf_counter()
        runner.read(tokens)
        between = time.perf_counter()
        runner.write(WRITTEN)
        if number:  # the first warms up
            read.append(count / (between - started))
            written.append(WRITTEN / (time.perf_counter() - between))
    return {"read": read, "written": written, "bytes": weight_bytes(folder)}


def weight_bytes(folder: Path) -> int:
    """Bytes of all weights but an embedding that is not the head as well."""
    if (folder / "genai_config.json").is_file():
        import onnx

        graph = onnx.load(str(folder / "model.onnx"), load_external_data=False).graph
        lengths = {
            tensor.name: int(next(e.value for e in tensor.external_data if e.key == "length"))
            for tensor in graph.initializer
            if tensor.external_data
        }
        return sum(size for name, size in lengths.items() if "embed_tokens" not in name)
    from phi3_mlflow.checkpoints.reader import CheckpointReader

    reader = CheckpointReader(folder)
    embedding = "lm_head.weight" in reader
    return sum(
        reader.entry(name).nbytes for name in reader if not (embedding and "embed_tokens" in name)
    )


class _Engine:
    """The engine of a logged model."""

    def __init__(self, folder: Path, provider: str) -> None:
        from phi3_mlflow.flavors.onnx import rope_switch
        from phi3_mlflow.genai.kept import kv_cache
        from phi3_mlflow.runtime.engine import EngineSettings
        from phi3_mlflow.runtime.engines import load_engine

        if (folder / "genai_config.json").is_file():
            places = {"onnx": str(folder)}
            about = {"rope_switch": rope_switch(folder), "kv_cache": kv_cache(folder)}
        else:
            places = {"checkpoint": str(folder), "tokenizer": str(folder)}
            about = {"dtype": "bfloat16"}
        self._engine = load_engine(places, EngineSettings(provider=provider, **about))

    def read(self, tokens: list[int]) -> None:
        self._session = self._engine.open(len(tokens) + WRITTEN + 8)
        self._session.extend(tokens)
        self._session.logits()  # has to wait for what is computed

    def write(self, count: int) -> None:
        token = None
        for _ in range(count):
            token = self._session.follow(token)


class _Generate:
    """transformers by itself."""

    def __init__(self, folder: Path, provider: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        self._model = loaded.to(provider).eval()

    def read(self, tokens: list[int]) -> None:
        import torch

        self._ids = torch.tensor([tokens], device=self._model.device)
        self._generate(1)

    def write(self, count: int) -> None:
        self._generate(count)

    def _generate(self, count: int) -> None:
        self._model.generate(
            self._ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
        )
        _wait()


class _Genai:
    """onnxruntime-genai by itself."""

    def __init__(self, folder: Path, provider: str) -> None:
        import onnxruntime_genai as og

        from phi3_mlflow.core.machine import usable_cores
        from phi3_mlflow.runtime.genai_folder import session_config

        self._og = og
        self._model = og.Model(session_config(og, folder, provider, usable_cores()))

    def read(self, tokens: list[int]) -> None:
        import numpy as np

        params = self._og.GeneratorParams(self._model)
        length = len(tokens) + WRITTEN
        params.set_search_options(max_length=length + 8, min_length=length, do_sample=False)
        self._generator = self._og.Generator(self._model, params)
        self._generator.append_tokens(np.array([tokens], dtype=np.int32))
        self._generator.get_logits()

    def write(self, count: int) -> None:
        for _ in range(count):
            self._generator.generate_next_token()
            self._generator.get_next_tokens()


if __name__ == "__main__":
    main()
