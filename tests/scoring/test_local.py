"""The local engine with real models: the answers of `predict`, and workers that die."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import psutil
import pytest

from phi3_mlflow.core.errors import EnvironmentProblem
from phi3_mlflow.flavors.bundle import signature
from phi3_mlflow.scoring.job import ScoringJob
from phi3_mlflow.scoring.local import LocalEngine
from phi3_mlflow.scoring.model import inspect_model
from phi3_mlflow.scoring.score import score
from phi3_mlflow.scoring.worker import WorkerSettings, row_seed
from tests.scoring.conftest import Models, questions, read_jsonl, write_jsonl

pytestmark = pytest.mark.slow

SYSTEM = {"role": "system", "content": "You answer in rhymes, and never in more than a line."}


def asking(text: str) -> str:
    return json.dumps({"messages": [{"role": "user", "content": text}]})


@pytest.fixture(scope="module")
def deadly(tmp_path_factory: pytest.TempPathFactory) -> WorkerSettings:
    folder = tmp_path_factory.mktemp("deadly") / "model"
    mlflow.pyfunc.save_model(
        folder,
        python_model=str(Path(__file__).with_name("deadly_model.py")),
        signature=signature("chat"),
        pip_requirements=["mlflow"],
    )
    return WorkerSettings(str(folder), 1, prompts=False, seeded=True, options={}, seed=0)


def test_a_row_that_kills_its_worker_is_an_error_and_the_others_are_answered(
    deadly: WorkerSettings,
) -> None:
    texts = ["a", "die", "b", "raise", "c", "d"]
    engine = LocalEngine(deadly, 1)
    rows = [(index, asking(text)) for index, text in enumerate(texts)]
    warm = [(9, asking("first"))]
    results = dict(row for batch in engine.run(iter([warm, rows])) for row in batch)
    assert [results[i].response for i in range(6)] == ["A", None, "B", None, "C", "D"]
    assert results[1].error == f"the process died over this row (code={-signal.SIGKILL})"
    assert results[3].error == "as it was told"
    assert not multiprocessing.active_children()


def test_each_worker_loads_one_model_and_all_end(deadly: WorkerSettings) -> None:
    engine = LocalEngine(deadly, 2)
    batches = [[(index, asking("a"))] for index in range(40)]
    processes = set()
    for scored in engine.run(iter(batches)):
        processes |= {result.completion_tokens for _, result in scored}
        assert len(multiprocessing.active_children()) <= 2
    assert engine.models_loaded == len(processes) <= 2
    assert os.getpid() not in processes
    assert not any(map(psutil.pid_exists, processes))


def test_workers_that_die_over_every_row_stop_the_work(deadly: WorkerSettings) -> None:
    batches = [[(9, asking("first"))], [(index, asking("die")) for index in range(8)]]
    running = LocalEngine(deadly, 1).run(iter(batches))
    assert [next(running)[0][0] for _ in range(3)] == [9, 0, 1]
    with pytest.raises(EnvironmentProblem, match="too little memory"):
        next(running)
    assert not multiprocessing.active_children()


def test_a_model_that_cannot_be_loaded_stops_the_work(tmp_path: Path) -> None:
    ask = WorkerSettings(str(tmp_path / "none"), 1, False, True, {}, 0)
    with pytest.raises(EnvironmentProblem, match="cannot be loaded"):
        list(LocalEngine(ask, 1).run(iter([[(0, asking("a"))]])))


def test_answers_are_those_of_predict_however_many_workers(store: Models, tmp_path: Path) -> None:
    rows = [
        {"messages": [SYSTEM, {"role": "user", "content": f"Tell me of {i}."}]} for i in range(6)
    ]
    rows += [{"prompt": "Hi"}, {"messages": [{"role": "robot", "content": "Hi"}]}]
    rows += [{"prompt": "too long " * 100}, {"prompt": "\ud800"}]
    file = write_jsonl(tmp_path / "in.jsonl", rows)
    options = {"max_tokens": 12, "temperature": 1.5}
    orders = [
        ScoringJob(file, tmp_path / f"{workers}.jsonl", store.chat, options, 5, workers=workers,
              batch_size=2)
        for workers in (1, 2)
    ]  # fmt: skip
    for order in orders:
        outcome = score(order)
        assert outcome.failed == 3
        assert outcome.models_loaded <= order.workers
    assert orders[0].output.read_bytes() == orders[1].output.read_bytes()
    model = mlflow.pyfunc.load_model(store.chat, model_config={"threads": 1})
    answered = read_jsonl(orders[0].output)
    for index, (row, got) in enumerate(zip(rows[:7], answered, strict=False)):
        messages = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
        request = {"messages": messages, **options}
        answer = model.predict(request, params={"seed": row_seed(5, index)})
        assert got["response"] == answer["choices"][0]["message"]["content"]
        assert got["finish_reason"] == answer["choices"][0]["finish_reason"]
        assert got["prompt_tokens"] == answer["usage"]["prompt_tokens"]
        assert got["completion_tokens"] == answer["usage"]["completion_tokens"]
    assert len({row["response"] for row in answered[:6]}) == 6
    assert "messages[0].role: 'robot' is not one of" in answered[7]["error"]
    assert "context" in answered[8]["error"]
    assert "surrogate" in answered[9]["error"]


@pytest.mark.parametrize("which", ["prompt", "transformers"])
def test_the_other_contract_and_flavor_are_scored_too(
    which: str, store: Models, tmp_path: Path
) -> None:
    file = write_jsonl(tmp_path / "in.jsonl", questions(2))
    uri = getattr(store, which)
    order = ScoringJob(file, tmp_path / "out.jsonl", uri, {"max_tokens": 3}, workers=1)
    assert score(order).failed == 0
    answers = read_jsonl(order.output)
    assert all(isinstance(row["response"], str) for row in answers)
    counted = [row["completion_tokens"] for row in answers]
    assert all(1 <= n <= 3 for n in counted) if which == "transformers" else counted == [None] * 2
    assert inspect_model(uri).prompts == (which == "prompt")


def test_the_step_survives_a_kill_leaves_no_process_and_records_its_run(
    store: Models, tmp_path: Path
) -> None:
    rows = [*questions(30), "nonsense"]
    file = write_jsonl(tmp_path / "in.jsonl", rows)
    options = ["--input", str(file), "--max-tokens", "32", "--workers", "2", "--batch-size", "2"]
    options += ["--model-uri", "models:/tiny@champion", "--temperature", "1", "--seed", "3"]
    command = [sys.executable, "-m", "steps.score", *options]
    out = tmp_path / "out.jsonl"
    journal = tmp_path / "out.jsonl.journal"
    process = subprocess.Popen(
        [*command, "--output", str(out)], cwd=tmp_path, env=store.place.whole_environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 3):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert workers
    process.kill()
    process.wait()
    assert not out.exists()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert alive == []
    done = store.place.run(*command, "--output", str(out), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = dict(part.split("=", 1) for part in done.stdout.split() if "=" in part)
    assert (told["rows"], told["failed"]) == ("31", "1")
    assert int(told["resumed"]) > 0
    assert "rows are in out.jsonl.journal already" in done.stderr
    whole = ScoringJob(file, tmp_path / "whole.jsonl", "models:/tiny/1",
                  {"max_tokens": 32, "temperature": 1.0}, 3, workers=1)  # fmt: skip
    score(whole)
    assert out.read_bytes() == whole.output.read_bytes()
    client = mlflow.MlflowClient(store.place.tracking_uri)
    run = client.get_run(told["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["rows"] == 31
    assert run.data.metrics["failed"] == 1
    assert run.data.metrics["tokens_per_second"] > 0
    assert run.data.params["resolved.model_uri"] == "models:/tiny/1"
    assert run.data.params["resolved.input"] == "…/in.jsonl"
    assert "None" not in run.data.params.values()
    inputs = {i.dataset.name: i.tags[0].value for i in run.inputs.dataset_inputs}
    assert inputs == {"in.jsonl": "scoring", "out.jsonl": "scored"}
