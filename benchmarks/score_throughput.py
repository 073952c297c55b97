"""Rows per second: `score` on this machine and on Spark, compared with `predict` row by row.

    python benchmarks/score_throughput.py --onnx ONNX_FOLDER
    python benchmarks/score_throughput.py --onnx ONNX_FOLDER --rows 96 --no-spark

Every way answers the same questions greedily and has to give the same texts. Loading is not
counted: each way is given a first batch of its own, and the clock runs from its end. The ways take
turns, best of the rounds. Spark is a standalone master with one and with two workers on loopback.
"In turns" is `batch=1`, a row after the other as in `predict`; else each worker computes 8 rows
together, which has to give the same texts whatever engine and however many workers do it.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from _result import write_result
from chat_common import store

from phi3_mlflow.core.machine import usable_cores
from phi3_mlflow.flavors.onnx import log_onnx
from phi3_mlflow.scoring.local import Batch, LocalEngine
from phi3_mlflow.scoring.model import inspect_model
from phi3_mlflow.scoring.score import Engine
from phi3_mlflow.scoring.spark import SparkEngine
from phi3_mlflow.scoring.worker import WorkerSettings

TOGETHER = 8
BATCH = 16
TOPICS = (
    "the capital of France", "three colours", "photosynthesis", "rain in autumn", "the number 84",
    "Hamlet", "red fruits", "the tides", "a good breakfast", "how bees find flowers",
)  # fmt: skip
SYSTEM = "You are a helpful assistant. Answer in plain words, without lists, and stay brief."


def questions(count: int) -> list[dict[str, Any]]:
    system = {"role": "system", "content": SYSTEM}
    return [
        {"messages": [system, {"role": "user", "content": f"Tell me about {topic}, part {i}."}]}
        for i, topic in zip(range(count), TOPICS * (1 + count // len(TOPICS)), strict=False)
    ]


class Measured:
    """One way: its texts, and the seconds of the fastest round.

    Args:
        like: the way whose texts it has to give; None: its own.
    """

    def __init__(
        self, name: str, run: Callable[[], tuple[float, list[str]]], like: Measured | None = None
    ) -> None:
        self.name, self._run, self.like = name, run, like or self
        self.seconds, self.texts = float("inf"), [""]

    def round(self) -> None:
        seconds, self.texts = self._run()
        self.seconds = min(self.seconds, seconds)
        print(f"  {self.name}: {seconds:.1f} s", flush=True)


def by_engine(make: Callable[[], Engine], asked: list[dict[str, Any]], warm: int) -> Any:
    """Seconds of all batches after the first `warm`, which load the models."""

    def run() -> tuple[float, list[str]]:
        rows = [(index, json.dumps(request)) for index, request in enumerate(asked)]
        batches = [rows[at : at + BATCH] for at in range(0, len(rows), BATCH)]
        texts = [""] * len(rows)
        started = 0.0

        def given() -> Iterator[Batch]:
            # As many single rows as there are workers, so that every model is loaded.
            yield from ([(-1 - at, rows[0][1])] for at in range(warm))
            yield from batches

        outstanding = warm
        left = len(rows)
        for scored in make().run(given()):
            outstanding -= sum(index < 0 for index, _ in scored)
            if not started and not outstanding:
                started = time.perf_counter()
                done_before = len(rows) - left
            for index, result in scored:
                if index >= 0:
                    texts[index] = result.response or f"error: {result.error}"
                    left -= 1
        seconds = time.perf_counter() - started
        # What a faster worker did while another was still loading does not count.
        return seconds * len(rows) / (len(rows) - done_before), texts

    return run


def by_predict(model: Any, asked: list[dict[str, Any]], limit: int) -> Any:
    def run() -> tuple[float, list[str]]:
        model.predict({**asked[0], "max_tokens": limit})
        started = time.perf_counter()
        answers = [model.predict({**request, "max_tokens": limit}) for request in asked]
        seconds = time.perf_counter() - started
        return seconds, [answer["choices"][0]["message"]["content"] for answer in answers]

    return run


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--onnx", type=Path, required=True, help="what the export step made")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-spark", action="store_true")
    return parser.parse_args()


def main() -> None:
    import mlflow

    from tests.fixtures.spark_cluster import standalone

    wanted = arguments()
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    asked = questions(wanted.rows)
    with store(), tempfile.TemporaryDirectory() as folder:
        uri = log_onnx(wanted.onnx, name="model").model_uri
        options = {"max_tokens": wanted.max_tokens}
        path = str(inspect_model(uri).path)

        def ask(threads: int, batch: int) -> WorkerSettings:
            return WorkerSettings(
                path, threads, prompts=False, seeded=True, options=options, seed=1, batch=batch
            )

        def local(workers: int, batch: int = TOGETHER) -> Any:
            mine = ask(max(1, usable_cores() // workers), batch)
            return by_engine(lambda: LocalEngine(mine, workers), asked, workers)

        def spark(workers: int) -> Any:
            def run() -> tuple[float, list[str]]:
                place = Path(tempfile.mkdtemp(dir=folder))
                with standalone(place, workers) as master:
                    # Twice the workers: both tasks could come to the one that is up first.
                    engine = by_engine(
                        lambda: SparkEngine(ask(1, TOGETHER), master), asked, 2 * workers
                    )
                    return engine()

            return run

        kept = mlflow.pyfunc.load_model(uri)
        predict = Measured("predict row by row", by_predict(kept, asked, wanted.max_tokens))
        one = Measured("score, local, 1 worker", local(1))
        ways = [
            predict,
            *(
                Measured(f"score, local, {n} worker{'s'[: n - 1]}, in turns", local(n, 1), predict)
                for n in (1, 2)
            ),
            one,
            Measured("score, local, 2 workers", local(2), one),
        ]
        if not wanted.no_spark:
            ways += [
                Measured(f"score, Spark, {n} worker{'s'[: n - 1]}", spark(n), one) for n in (1, 2)
            ]
        for done in range(1, wanted.rounds + 1):
            for way in ways:
                way.round()
            report(ways, wanted, done)  # after each: a run that is cut short has something to show


def report(ways: list[Measured], wanted: argparse.Namespace, rounds: int) -> None:
    base = next(way for way in ways if way.name == "predict row by row")
    rows = []
    for way in ways:
        same = sum(one == other for one, other in zip(way.texts, way.like.texts, strict=True))
        rows.append([way.name, wanted.rows / way.seconds, base.seconds / way.seconds, same])
    write_result(
        "score_throughput",
        "Scoring a file, compared with `predict` row by row",
        ["way", "rows/s", "ratio", "same texts"],
        rows,
        notes=f"{wanted.rows} rows with a system prompt in common, up to {wanted.max_tokens} new "
        f"tokens, {usable_cores()} cores; loading not counted; the ways take turns, best of "
        f"{rounds}. "
        f"Workers compute {TOGETHER} rows together, or one after the other (in turns). 'Same "
        "texts': as predict for those in turns, as one worker for the others. Spark: a standalone "
        "master on the same machine.",
        extra={"seconds": {way.name: way.seconds for way in ways}},
    )


if __name__ == "__main__":
    main()
