"""What the chat benchmarks share: their arguments, a store of their own, and a timed stream."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


def arguments(description: str, *wanted: str) -> argparse.Namespace:
    """The command line: `onnx` and `checkpoint` are directories that the steps leave."""
    parser = argparse.ArgumentParser(description=description)
    if "onnx" in wanted:
        parser.add_argument("--onnx", type=Path, required=True, help="what the export step made")
    if "checkpoint" in wanted:
        parser.add_argument("--checkpoint", type=Path, required=True, help="what fetch made")
    parser.add_argument("--threads", type=int, default=0, help="0 takes every core")
    parser.add_argument("--repeat", type=int, default=7, help="measurements of each kind")
    return parser.parse_args()


@contextmanager
def store() -> Iterator[Path]:
    """A tracking store in a temporary folder, for models logged by the benchmark."""
    import mlflow

    with tempfile.TemporaryDirectory() as folder:
        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        experiment = mlflow.create_experiment("bench", f"{Path(folder).as_uri()}/artifacts")
        mlflow.set_experiment(experiment_id=experiment)
        yield Path(folder)


def ask(text: str, tokens: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": tokens}


def timed_stream(model: Any, wanted: dict[str, Any]) -> tuple[float, float, dict[str, int]]:
    """Answer a request as a stream.

    Returns:
        Seconds to the first piece of text, tokens/s from then on, and the usage.
    """
    started = time.perf_counter()
    first, last = 0.0, {}
    for chunk in model.predict_stream(wanted):
        if not first and chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
            first = time.perf_counter()
        last = chunk
    usage = last["usage"]
    rate = (usage["completion_tokens"] - 1) / (time.perf_counter() - first)
    return first - started, rate, usage
