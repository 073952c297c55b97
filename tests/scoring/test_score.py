"""Scoring a file: stopped at any moment and gone on with, the same bytes as undisturbed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from phi3_mlflow.core.errors import EnvironmentProblem, UserError
from phi3_mlflow.scoring import score as scoring
from phi3_mlflow.scoring.job import ScoringJob, ScoringSummary
from phi3_mlflow.scoring.model import ScoredModel
from phi3_mlflow.scoring.score import score
from phi3_mlflow.scoring.worker import row_seed
from tests.conftest import ROOT
from tests.scoring.conftest import questions, read_jsonl, write_jsonl
from tests.scoring.killed import EchoEngine

BAD = ["nonsense", {"id": 9}]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> EchoEngine:
    """Answers instead of a model."""
    echo = EchoEngine()
    monkeypatch.setattr(scoring, "inspect_model", lambda uri: ScoredModel(Path(), uri, False, True))
    monkeypatch.setattr(scoring, "_engine", lambda *_: echo)
    return echo


@pytest.fixture
def order(tmp_path: Path) -> ScoringJob:
    file = write_jsonl(tmp_path / "in.jsonl", [*questions(20), *BAD])
    return ScoringJob(file, tmp_path / "out.jsonl", "models:/x/1", batch_size=3)


def left_in(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()} - {"in.jsonl"}


FINISHED = {"out.jsonl", "out.jsonl.score.json"}


def test_every_row_comes_back_in_order_with_an_answer_or_an_error(
    engine: EchoEngine, order: ScoringJob, tmp_path: Path
) -> None:
    outcome = score(order)
    rows = read_jsonl(order.output)
    assert [row.get("id") for row in rows] == [*range(20), None, 9]
    assert all(f"Say {row['id']} in" in row["response"] for row in rows[:20])
    assert [row["response"] for row in rows[20:]] == [None, None]
    assert rows[20]["text"] == "nonsense"
    assert rows[20]["error"].startswith("line 21: cannot be read as JSON")
    assert rows[21]["error"] == "line 22: has neither a prompt nor messages"
    assert (outcome.rows, outcome.failed, outcome.resumed) == (22, 2, 0)
    assert (outcome.prompt_tokens, outcome.completion_tokens) == (60, 40)
    assert engine.asked == list(range(20))
    assert left_in(tmp_path) == FINISHED
    assert json.loads(order.record.read_text())["outcome"]["output_sha256"] == outcome.output_sha256


@pytest.mark.parametrize(
    "moment",
    ["half:1", "half:2", "half:5", "batch:1", "batch:4", "output", "record", "removal"],
)
def test_a_killed_run_is_gone_on_with_and_no_row_is_lost_or_done_twice(
    moment: str, engine: EchoEngine, order: ScoringJob, tmp_path: Path
) -> None:
    whole = replace(order, output=tmp_path / "whole" / "out.jsonl", seed=7)
    whole.output.parent.mkdir()
    score(whole)
    engine.asked.clear()
    command = [sys.executable, "-m", "tests.scoring.killed", str(order.input), str(order.output)]
    killed = subprocess.run([*command, moment], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    kept = {"half:1": 0, "half:2": 0, "half:5": 9, "batch:1": 3, "batch:4": 12}.get(moment, 22)
    outcome = score(order)
    assert outcome.resumed == kept
    assert engine.asked == list(range(kept, 20))
    assert order.output.read_bytes() == whole.output.read_bytes()
    assert left_in(tmp_path) - {"whole"} == FINISHED


def test_a_run_stopped_again_and_again_asks_each_row_once(
    engine: EchoEngine, order: ScoringJob, tmp_path: Path
) -> None:
    for _ in range(3):
        engine.fail_after = len(engine.asked) + 4
        with pytest.raises(KeyboardInterrupt):
            score(order)
        assert not order.output.exists()
    engine.fail_after = None
    assert score(order).rows == 22
    assert engine.asked == list(range(20))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_uri": "models:/x/2"}, "model_uri: models:/x/1 before, models:/x/2 now"),
        ({"options": {"max_tokens": 5}}, "max_tokens: None before, 5 now"),
        ({"seed": 4}, "seed: 3 before, 4 now"),
    ],
)
def test_going_on_with_something_else_is_refused(
    change: dict[str, object], words: str, engine: EchoEngine, order: ScoringJob
) -> None:
    order = replace(order, seed=3)
    engine.fail_after = 4
    with pytest.raises(KeyboardInterrupt):
        score(order)
    engine.fail_after = None
    with pytest.raises(UserError) as refused:
        score(replace(order, **change))
    assert words in str(refused.value)
    assert "force=true" in str(refused.value)
    before = len(engine.asked)
    assert score(replace(order, **change, force=True)).resumed == 0
    assert engine.asked[before:] == list(range(20))


def test_another_input_is_refused_and_another_batch_size_is_not(
    engine: EchoEngine, order: ScoringJob
) -> None:
    engine.fail_after = 4
    with pytest.raises(KeyboardInterrupt):
        score(order)
    engine.fail_after = None
    lines = order.input.read_bytes()
    order.input.write_bytes(lines + b'{"prompt": "one more"}\n')
    with pytest.raises(UserError, match="rows: 22 before, 23 now"):
        score(order)
    order.input.write_bytes(lines)
    assert score(replace(order, batch_size=50)).resumed == 6


def test_the_same_again_does_nothing_and_something_else_is_refused(
    engine: EchoEngine, order: ScoringJob
) -> None:
    first = score(order)
    engine.asked.clear()
    again = score(order)
    assert again.was_there
    assert (again.rows, again.failed, again.output_sha256) == (22, 2, first.output_sha256)
    assert engine.asked == []
    for changed in (replace(order, seed=1), replace(order, options={"temperature": 1.0})):
        with pytest.raises(UserError, match="is there already"):
            score(changed)
    order.output.write_text("mine\n")
    with pytest.raises(UserError, match="is there already"):
        score(order)
    assert order.output.read_text() == "mine\n"
    assert score(replace(order, force=True)).output_sha256 == first.output_sha256


def test_an_output_that_cannot_be_is_refused_before_any_work(
    engine: EchoEngine, order: ScoringJob, tmp_path: Path
) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    for name, words in (
        ("out.csv", "should be of the input's format and end in .jsonl"),
        ("in.jsonl", "is the input"),
        ("folder.jsonl", "is a folder"),
    ):
        with pytest.raises(UserError, match=words):
            score(replace(order, output=tmp_path / name))
    blocked = tmp_path / "file" / "out.jsonl"
    blocked.parent.write_text("")
    with pytest.raises(EnvironmentProblem, match="cannot be written"):
        score(replace(order, output=blocked))
    assert engine.asked == []


def test_an_input_that_changes_meanwhile_gives_no_output(
    engine: EchoEngine, order: ScoringJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = engine.run

    def changing(batches):
        yield from run(batches)
        order.input.write_bytes(order.input.read_bytes() + b'{"prompt": "late"}\n')

    monkeypatch.setattr(engine, "run", changing)
    with pytest.raises(UserError, match="was changed while it was scored"):
        score(order)
    assert not order.output.exists()


def test_the_three_formats_give_the_same_answers(engine: EchoEngine, tmp_path: Path) -> None:
    rows = [{"id": str(i), "prompt": f'Say {i}, "please"\n'} for i in range(5)]
    write_jsonl(tmp_path / "in.jsonl", rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in.parquet")
    lines = [f'{row["id"]},"' + row["prompt"].replace('"', '""') + '"' for row in rows]
    (tmp_path / "in.csv").write_text("id,prompt\n" + "\n".join(lines) + "\n")
    for name in ("jsonl", "csv", "parquet"):
        score(ScoringJob(tmp_path / f"in.{name}", tmp_path / f"out.{name}", "models:/x/1"))
    wanted = [row["response"] for row in read_jsonl(tmp_path / "out.jsonl")]
    table = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    assert table.column("response").to_pylist() == wanted
    import csv

    with (tmp_path / "out.csv").open(newline="") as stream:
        assert [row["response"] for row in csv.DictReader(stream)] == wanted


def test_a_model_of_the_prompt_contract_takes_prompts_only(
    engine: EchoEngine, order: ScoringJob, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(scoring, "inspect_model", lambda uri: ScoredModel(Path(), uri, True, True))
    message = {"messages": [{"role": "user", "content": "Hi"}]}
    write_jsonl(order.input, [{"prompt": "<|user|>Hi"}, message])
    assert score(order).failed == 1
    first, second = read_jsonl(order.output)
    assert first["response"] == 'said {"prompt": "<|user|>Hi"}'
    assert "contract prompt" in second["error"]


def test_every_row_has_a_seed_of_its_own() -> None:
    seeds = {row_seed(seed, index) for seed in range(3) for index in range(100)}
    assert len(seeds) == 300
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert row_seed(5, 7) == 4742540365310946292


def test_rates_count_what_was_scored_now() -> None:
    outcome = ScoringSummary(10, "", resumed=6, seconds=2.0, new_tokens=30, completion_tokens=80)
    assert outcome.metrics()["rows_per_second"] == 2
    assert outcome.metrics()["tokens_per_second"] == 15
