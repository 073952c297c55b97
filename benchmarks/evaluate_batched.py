"""Batched scoring compared with one text at a time: throughput and scores of the same run.

    python benchmarks/evaluate_batched.py [MODEL_FOLDER] [REFERENCE_CHECKPOINT]

Without arguments the model is what `export`, and the reference what `fetch`, left for the embedded
default. Pieces of several lengths are scored both ways, in turns, so that a machine that is busy
with other things slows both alike; the best of the rounds counts.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from _result import write_result  # noqa: E402
from _torch_logits import TorchLogits  # noqa: E402

from phi3_mlflow.artifacts.cache import StepCache  # noqa: E402
from phi3_mlflow.evaluation import datasets  # noqa: E402
from phi3_mlflow.evaluation.divergence import batches, tokenize  # noqa: E402
from phi3_mlflow.evaluation.logits import LogitSource, OnnxLogits  # noqa: E402

WINDOWS = (16, 64, 256)
BATCH_TOKENS = 1024
TOKENS = 768
ROUNDS = 2


def folder(position: int, step: str) -> Path:
    if len(sys.argv) > position:
        return Path(sys.argv[position])
    entry = StepCache().latest("smollm2-135m", step)
    if entry is None:
        raise SystemExit(f"step {step} has left nothing: run  mlflow run . -e {step}  first")
    return entry.path


def score(source: LogitSource, pieces: list[list[int]], batch_tokens: int) -> tuple[float, float]:
    """Seconds, and the sum of the negative log-likelihood."""
    import numpy as np
    import torch

    start, total = time.perf_counter(), 0.0
    for group in batches([len(piece) for piece in pieces], batch_tokens):
        some = source.logits([np.array(pieces[i], dtype=np.int32) for i in group])
        for logits, index in zip(some, group, strict=True):
            ids = torch.tensor(pieces[index][1:])
            places = torch.from_numpy(np.ascontiguousarray(logits[: len(ids)]))
            total += torch.nn.functional.cross_entropy(places, ids, reduction="sum").item()
    return time.perf_counter() - start, total


def main() -> None:
    model, reference = folder(1, "export"), folder(2, "fetch")
    texts = datasets.load_heldout(quick=True)
    tokens = [i for _, ids in tokenize(reference, ((t.id, t.text) for t in texts)) for i in ids]
    tokens = tokens[:TOKENS]
    rows: list[list[str | int | float | None]] = []
    for name, source in (("ONNX int4", OnnxLogits(model)), ("full", TorchLogits(reference))):
        for window in WINDOWS:
            pieces = [tokens[i : i + window] for i in range(0, len(tokens), window)]
            pieces = [piece for piece in pieces if len(piece) > 1]
            alone, together, nll = [], [], (0.0, 0.0)
            for _ in range(ROUNDS):
                one, first = score(source, pieces, 0)
                many, second = score(source, pieces, BATCH_TOKENS)
                alone.append(one)
                together.append(many)
                nll = (first, second)
            count = sum(len(piece) for piece in pieces)
            difference = abs(nll[1] - nll[0]) / nll[0]
            rows.append(
                [
                    name, window, count / min(alone), count / min(together),
                    min(alone) / min(together), f"{difference:.1e}",
                ]
            )  # fmt: skip
    write_result(
        "evaluate_batched",
        title="Scoring in batches, compared with one piece at a time",
        columns=[
            "model", "tokens per piece", "one at a time, tokens/s", "batched, tokens/s", "ratio",
            "difference in NLL",
        ],
        rows=rows,
        notes=f"Batches of up to {BATCH_TOKENS} places; best of {ROUNDS} rounds taken in turns.",
    )  # fmt: skip


if __name__ == "__main__":
    main()
