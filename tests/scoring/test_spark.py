"""The Spark engine: the local engine's output to the last byte, one model a worker process."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from phi3_mlflow.core.errors import EnvironmentProblem
from phi3_mlflow.scoring import spark
from phi3_mlflow.scoring.job import ScoringJob
from phi3_mlflow.scoring.local import LocalEngine
from phi3_mlflow.scoring.score import score
from phi3_mlflow.scoring.spark import SparkEngine
from phi3_mlflow.scoring.worker import WorkerSettings
from tests.fixtures.spark_cluster import spark_is_missing, standalone
from tests.scoring.conftest import Models, questions, read_jsonl, write_jsonl

needs_spark = pytest.mark.skipif(bool(spark_is_missing()), reason=spark_is_missing() or "")
OPTIONS = {"max_tokens": 8, "temperature": 1.0}


@pytest.fixture(scope="session")
def rows(models: Models) -> Path:
    """A file of rows, and what the local engine makes of it beside it, as local.jsonl."""
    folder = models.place.folder
    content = [*questions(20), {"prompt": 5}, {"messages": [{"role": "robot", "content": "é"}]}]
    return write_jsonl(folder / "in.jsonl", content)


@pytest.fixture
def order(store: Models, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ScoringJob:
    monkeypatch.setenv("PYSPARK_PYTHON", sys.executable)
    monkeypatch.setenv("PYSPARK_DRIVER_PYTHON", sys.executable)
    local = ScoringJob(rows, rows.with_name("local.jsonl"), store.chat, OPTIONS, 3, workers=1)
    assert score(local).failed == 2  # the second time it is there
    return replace(local, output=tmp_path / "out.jsonl", engine="spark", batch_size=2)


@needs_spark
@pytest.mark.slow
def test_spark_goes_on_with_what_the_local_engine_began_and_gives_the_same_bytes(
    order: ScoringJob, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, count = LocalEngine.run, 0

    def stopping(self, batches):
        nonlocal count
        for scored in run(self, batches):
            count += len(scored)
            yield scored
            if count >= 6:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LocalEngine, "run", stopping)
        with pytest.raises(KeyboardInterrupt):
            score(replace(order, engine="local"))
    outcome = score(replace(order, workers=2))
    assert outcome.resumed == count == 6
    assert 1 <= outcome.models_loaded <= 2
    assert order.output.read_bytes() == rows.with_name("local.jsonl").read_bytes()


@needs_spark
@pytest.mark.slow
def test_a_standalone_master_with_two_workers_loads_two_models_and_gives_the_same_bytes(
    order: ScoringJob, rows: Path, tmp_path: Path
) -> None:
    with standalone(tmp_path, workers=2) as master:
        outcome = score(replace(order, master=master))
    assert outcome.models_loaded == 2
    assert order.output.read_bytes() == rows.with_name("local.jsonl").read_bytes()
    errors = [row["error"] for row in read_jsonl(order.output)]
    assert errors[:20] == [None] * 20
    assert "robot" in errors[21]


@needs_spark
def test_a_master_that_is_not_there_is_named() -> None:
    engine = SparkEngine(WorkerSettings("", 1, False, True, {}, 0), "spark://127.0.0.1:1")
    with pytest.raises(EnvironmentProblem, match=r"spark://127\.0\.0\.1:1 does not answer"):
        list(engine.run(iter([])))


def test_without_pyspark_or_java_the_message_says_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = SparkEngine(WorkerSettings("", 1, False, True, {}, 0), "local[1]")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(EnvironmentProblem, match=r"-r requirements/spark\.txt"):
            list(engine.run(iter([])))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(spark.shutil, "which", lambda name: None)
    with pytest.raises(EnvironmentProblem, match="openjdk-17-jre-headless"):
        list(engine.run(iter([])))
