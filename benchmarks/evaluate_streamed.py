"""The full-precision part of an evaluation, layer by layer, compared with transformers.

    python benchmarks/evaluate_streamed.py [CHECKPOINT]
    python benchmarks/random_checkpoint.py phi-3-mini-4k /tmp/random-phi3
    python benchmarks/evaluate_streamed.py /tmp/random-phi3 --tokens 14336 \\
        --transformers auto --transformers-tokens 2 --name evaluate_streamed_full

Without an argument the checkpoint is what `fetch` left for the embedded default. Each way computes
the logits at every place of the same pieces and the likelihood of the tokens that follow, in a
process of its own: transformers with the model as a whole, then the project's way for the first
version, and again for a second one, which finds what was kept. `--transformers auto` takes the
dtype of the checkpoint; where that is bfloat16 and the processor has none, a few tokens take
minutes, so `--transformers-tokens` bounds them and the time is scaled up. Peak memory is the
largest resident set, libraries included; bytes read are those that went through read calls.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from _result import Cell, write_result  # noqa: E402

from phi3_mlflow.artifacts.cache import StepCache  # noqa: E402

_WAY = """
import json, sys
sys.path[:0] = [{root!r}, {benchmarks!r}]
import numpy as np, torch
from contextlib import ExitStack
from pathlib import Path
from phi3_mlflow.artifacts.cache import StepCache
from phi3_mlflow.core.meter import ResourceMeter
from phi3_mlflow.evaluation.divergence import batches
given = json.load(open({given!r}))
pieces = [np.array(piece, dtype=np.int32) for piece in given["pieces"]][: {most}]
meter, checkpoint, nll = ResourceMeter(), Path(given["checkpoint"]), 0.0
with ExitStack() as held:
    if {way!r} == "transformers":
        from _torch_logits import TorchLogits
        source = TorchLogits(checkpoint, {dtype!r})
    else:
        from phi3_mlflow.evaluation.streamed import streamed
        store = StepCache(Path(given["store"]))
        source = held.enter_context(streamed(checkpoint, pieces, store))
    for group in batches([len(piece) for piece in pieces], {batch}):
        for index, logits in zip(group, source.logits([pieces[i] for i in group])):
            ids = torch.from_numpy(pieces[index][1:].astype(np.int64))
            for start in range(0, len(ids), 64):
                some = torch.from_numpy(logits[start : start + 64][: len(ids) - start])
                want = ids[start : start + 64]
                nll += torch.nn.functional.cross_entropy(some, want, reduction="sum").item()
places = sum(len(piece) - 1 for piece in pieces)
print(json.dumps({{**meter.figures(), "nll": nll / places, "tokens": sum(map(len, pieces))}}))
"""


def run(way: str, given: Path, most: int, dtype: str, batch: int) -> dict[str, float]:
    code = _WAY.format(
        root=str(ROOT), benchmarks=str(ROOT / "benchmarks"), given=str(given), way=way, most=most,
        dtype=dtype, batch=batch,
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True,
        env=os.environ | {"TRANSFORMERS_VERBOSITY": "error"},
    )  # fmt: skip
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def texts(checkpoint: Path, tokens: int | None, window: int) -> list[list[int]]:
    """The quick held-out texts, or random tokens where so many are asked for."""
    if tokens is not None:
        import numpy as np

        vocabulary = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
        ids = np.random.default_rng(0).integers(0, vocabulary, tokens).tolist()
        return [ids[i : i + window] for i in range(0, tokens, window)]
    from phi3_mlflow.evaluation import datasets
    from phi3_mlflow.evaluation.divergence import cut, tokenize

    found = tokenize(checkpoint, ((t.id, t.text) for t in datasets.load_heldout(quick=True)))
    return [ids.tolist() for _, ids in cut(found, window)]


def default_checkpoint() -> Path:
    entry = StepCache().latest("smollm2-135m", "fetch")
    if entry is None:
        raise SystemExit("step fetch has left nothing: run  mlflow run . -e fetch  first")
    return entry.path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--tokens", type=int, help="random ones, in place of the quick texts")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1024, help="places whose logits are held")
    parser.add_argument("--transformers", choices=["float32", "auto", "none"], default="float32")
    parser.add_argument("--transformers-tokens", type=int, help="so many at most, scaled up")
    parser.add_argument("--work", type=Path, help="where the pieces and states lie")
    parser.add_argument("--name", default="evaluate_streamed")
    args = parser.parse_args()
    checkpoint = args.checkpoint or default_checkpoint()
    pieces = texts(checkpoint, args.tokens, args.window)
    total = sum(map(len, pieces))
    rows: list[list[Cell]] = []

    def add(what: str, figures: dict[str, float]) -> None:
        seconds = figures["wall_time_s"] * total / figures["tokens"]
        rows.append(
            [
                what, seconds, figures["peak_rss_bytes"] / 1e9, figures.get("bytes_read", 0) / 1e9,
                math.exp(figures["nll"]), int(figures["tokens"]),
            ]
        )  # fmt: skip
        print(rows[-1], flush=True)

    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        given, store = Path(folder, "given.json"), Path(folder, "store")
        content = {"checkpoint": str(checkpoint.resolve()), "store": str(store)}
        given.write_text(json.dumps({**content, "pieces": pieces}))
        if args.transformers != "none":
            small, most = given, len(pieces)
            if args.transformers_tokens:
                small, most = Path(folder, "small.json"), 1
                first = pieces[0][: args.transformers_tokens]
                small.write_text(json.dumps({**content, "pieces": [first]}))
            figures = run("transformers", small, most, args.transformers, args.batch)
            add(f"transformers, {args.transformers}", figures)
        for what in ("layer by layer", "layer by layer, a second version"):
            add(what, run("streamed", given, len(pieces), "", args.batch))
    weights = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    write_result(
        args.name,
        title=f"Full precision on {total:,} tokens, weights of {weights / 1e9:.2f} GB",
        columns=["way", "seconds", "peak RSS (GB)", "read (GB)", "perplexity", "tokens computed"],
        rows=rows,
        notes=(
            f"Pieces of {args.window} tokens, each way in a process of its own, importing and "
            "loading included; GB is 10^9 bytes. Seconds are for all tokens, scaled up where fewer "
            "were computed."
        ),
    )


if __name__ == "__main__":
    main()
