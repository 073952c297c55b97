"""The step `train`, alone and in `main`: a version that says what it was trained on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest

from phi3_mlflow.artifacts.cache import StepCache
from phi3_mlflow.artifacts.provenance import TRAINING_FILES
from phi3_mlflow.checkpoints.validate import validate_checkpoint
from phi3_mlflow.config.loading import load_profile
from phi3_mlflow.core.errors import EXIT_BAD_INPUT, UserError
from phi3_mlflow.pipeline.inputs import rows_input
from phi3_mlflow.stages.train import TrainInputs, _load, _require_processes
from phi3_mlflow.tracking import registry
from tests.conftest import Workspace
from tests.fixtures.tiny_line import write_profile
from tests.fixtures.tiny_phi3 import make_tiny

SETTINGS = {"lora_r": 4, "lora_alpha": 8, "learning_rate": 0.01, "save_steps": 3, "threads": 1}
# A tiny random model learns a little of its task, and its general sets are too small to tell.
GATE = {
    "thresholds": {"kl_mean": {"max": 50}},
    "trained": {"better": {"task_loss": {"by": 0}}, "not_worse": {}},
}


def write_rows(file: Path, first: int, last: int, **more: Any) -> Path:
    rows = [{"prompt": f"Ticket {i}: it is broken.", "completion": f"Team {i % 3}.", **more}
            for i in range(first, last)]  # fmt: skip
    with file.open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    return file


def write_texts(file: Path) -> Path:
    """What is rehearsed: a text and a conversation, both long enough for a piece."""
    said = [{"role": "user", "content": "Say it. " * 12}, {"role": "assistant", "content": "It."}]
    rows = [{"text": "Once upon a time there was a tale. " * 12}, {"messages": said}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


def trained_by(place: Workspace) -> Path:
    entry = StepCache(place.cache).latest("tiny", "train")
    assert entry is not None
    return entry.path


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, Path]:
    place = Workspace(tmp_path_factory.mktemp("train"))
    write_rows(place.folder / "tickets.jsonl", 0, 60)
    write_texts(place.folder / "general.jsonl")
    train = {"data": "tickets.jsonl", "validation_share": 0.4, "rehearsal": "general.jsonl",
             "rehearsal_weight": 0.1, **SETTINGS}  # fmt: skip
    profile = write_profile(place.folder, train=train, gate=GATE)
    done = place.step("main", "--profile", str(profile))
    assert done.returncode == 0, done.stdout + done.stderr
    return place, profile


@pytest.mark.slow
def test_main_ends_with_a_version_that_says_what_it_was_trained_on(line, monkeypatch) -> None:
    place, _ = line
    place.enter(monkeypatch)
    folder = trained_by(place)
    validate_checkpoint(folder)
    report = json.loads((folder / "training.json").read_text())
    assert report["format"] == "prompt_completion"
    assert report["train_rows"] + report["validation_rows"] == 60
    assert report["validation_rows"] > 0
    kept = (folder / "validation.jsonl").read_text().splitlines()
    assert len(kept) == report["validation_rows"]
    assert {m["role"] for line in kept for m in json.loads(line)["messages"]} == {
        "user",
        "assistant",
    }
    assert report["steps"] == -(-report["train_rows"] // 8)
    assert report["curve"][-1]["epoch"] == 1
    assert sorted(p.name for p in (folder / "adapter").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    assert not list((place.cache / "downloads").glob("train-*"))
    version = registry.describe(registry.VersionName("tiny", "1"))
    fetched = StepCache(place.cache).latest("tiny", "fetch")
    known = json.loads((fetched.path / "provenance.json").read_text())
    assert version.tags["base_checkpoint_sha256"] == known["checkpoint_sha256"]
    assert version.tags["checkpoint_sha256"] != known["checkpoint_sha256"]
    assert version.tags["data_sha256"] == report["data_sha256"]
    assert version.tags["adapter_sha256"] == report["adapter_sha256"]
    text = mlflow.MlflowClient().get_model_version("tiny", "1").description
    assert f"**Fine-tuned**: LoRA on {report['train_rows']} rows, 1 epochs of" in text


@pytest.mark.slow
def test_the_gate_measures_the_task_and_the_report_shows_it(line, monkeypatch) -> None:
    place, _ = line
    place.enter(monkeypatch)
    tags = registry.describe(registry.VersionName("tiny", "1")).tags
    assert tags["gate_decision"] == "promote"
    assert "better than the untrained base in: loss on the task" in tags["gate_reasons"]
    assert registry.alias_of("tiny", registry.CHAMPION) == "1"
    folder = Path(mlflow.artifacts.download_artifacts(
        f"runs:/{tags['evaluation_run']}/evaluation/1"
    ))  # fmt: skip
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["task_loss"] < metrics["task_loss_base"]
    assert {"task_accuracy", "task_accuracy_base", "task_accuracy_full", "task_loss_full"} <= (
        metrics.keys()
    )
    rows = (trained_by(place) / "validation.jsonl").read_text().splitlines()
    assert len((folder / "task_answers.jsonl").read_text().splitlines()) == len(rows)
    (comparison,) = json.loads((folder / "verdict.json").read_text())["comparisons"]
    assert (comparison["than"], comparison["wanted"]) == ("base", "better")
    page = (folder / "report.html").read_text()
    for heading in ("How it was trained", "Wrong at the task", "before training"):
        assert heading in page


@pytest.mark.slow
def test_what_was_trained_on_something_else_is_not_the_base(line, monkeypatch) -> None:
    place, profile = line
    place.enter(monkeypatch)
    other = place.folder / "other"
    make_tiny(other, "phi-3-mini-4k")
    done = place.step("evaluate", "--profile", str(profile), "--base", str(other))
    assert done.returncode == EXIT_BAD_INPUT
    assert "is not what the fine-tuned checkpoint was trained from" in done.stderr


@pytest.mark.slow
def test_the_run_has_the_curve_the_rows_and_the_adapter(line, monkeypatch) -> None:
    place, _ = line
    place.enter(monkeypatch)
    client = mlflow.MlflowClient()
    experiment = mlflow.get_experiment_by_name("phi3-mlflow")
    (run,) = client.search_runs([experiment.experiment_id], "tags.step = 'train'")
    report = json.loads((trained_by(place) / "training.json").read_text())
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(p.step, p.value) for p in history] == [
        (p["step"], p["loss"]) for p in report["curve"] if "loss" in p
    ]
    for name in (
        "learning_rate",
        "grad_norm",
        "tokens_per_second",
        "validation_loss",
        "seconds_left",
        "rehearsal_kl",
    ):
        assert client.get_metric_history(run.info.run_id, name)
    assert client.get_metric_history(run.info.run_id, "seconds_left")[-1].value == 0
    assert "system/cpu_utilization_percentage" in run.data.metrics
    given = {one.dataset.name: one for one in run.inputs.dataset_inputs}
    assert given.keys() == {"tickets", "general"}
    assert report["data_sha256"].startswith(given["tickets"].dataset.digest)
    adapter = client.list_artifacts(run.info.run_id, "adapter")
    assert {Path(f.path).name for f in adapter} == {
        "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip


@pytest.mark.slow
def test_a_second_run_does_nothing_and_more_rows_train_again(line, monkeypatch) -> None:
    place, profile = line
    place.enter(monkeypatch)
    before = trained_by(place)
    done = place.step("main", "--profile", str(profile))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Nothing to do" in done.stdout + done.stderr
    assert trained_by(place) == before
    # A step alone takes what train has left, and nothing but the checkpoint.
    done = place.step("quantize", "--profile", str(profile))
    assert "cached=true" in done.stdout, done.stdout + done.stderr
    for step in ("quantize", "export"):
        entry = StepCache(place.cache).latest("tiny", step)
        assert not {f.path.partition("/")[0] for f in entry.manifest.files} & set(TRAINING_FILES)
    write_rows(place.folder / "tickets.jsonl", 60, 80, origin="mail")
    done = place.step("main", "--profile", str(profile), "--dry-run", "true")
    assert "train     would run: changed: inputs.data" in done.stdout
    done = place.step("train", "--profile", str(profile))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "carry loss" in done.stdout + done.stderr
    assert "columns that are not read: origin" in done.stdout + done.stderr
    after = trained_by(place)
    report = json.loads((after / "training.json").read_text())
    assert report["train_rows"] + report["validation_rows"] == 80


@pytest.mark.slow
def test_the_same_again_gives_the_same_folder(line, monkeypatch) -> None:
    place, profile = line
    place.enter(monkeypatch)
    first = StepCache(place.cache).latest("tiny", "train")
    done = place.step("train", "--profile", str(profile), "--force", "true")
    assert done.returncode == 0, done.stdout + done.stderr
    again = StepCache(place.cache).latest("tiny", "train")
    assert first.origin["time"] != again.origin["time"]
    assert first.key == again.key
    assert first.manifest.digest == again.manifest.digest


@pytest.mark.slow
def test_killed_it_goes_on_to_the_same_folder(line, monkeypatch) -> None:
    place, profile = line
    place.enter(monkeypatch)
    assert place.step("train", "--profile", str(profile)).returncode == 0
    undisturbed = StepCache(place.cache).latest("tiny", "train")
    options = ("--profile", str(profile), "--force", "true")
    process = subprocess.Popen(
        [sys.executable, "-m", "steps.train", *options],
        cwd=place.folder,
        env=place.whole_environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    work = place.cache / "downloads" / f"train-{undisturbed.key}" / "run"
    while process.poll() is None and not list(work.glob("checkpoint-*/manifest.json")):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    done = place.step("train", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "going on after step" in done.stdout + done.stderr
    again = StepCache(place.cache).latest("tiny", "train")
    assert again.manifest.digest == undisturbed.manifest.digest


@pytest.mark.slow
def test_rows_that_measure_the_model_are_refused(line, monkeypatch) -> None:
    place, profile = line
    place.enter(monkeypatch)
    rows = write_rows(place.folder / "seen.jsonl", 0, 30)
    with rows.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"prompt": "say 1.", "completion": "1"}) + "\n")
    done = place.step("train", "--profile", str(profile), "--data", str(rows))
    assert done.returncode == EXIT_BAD_INPUT
    assert "line 31 equals question q1" in done.stderr
    assert "train.allow_overlap" in done.stderr


def test_relative_files_count_from_the_profiles_folder(tmp_path, monkeypatch) -> None:
    profile = write_profile(tmp_path, train={"data": "a.jsonl", "validation": "/rows/b.jsonl"})
    monkeypatch.chdir("/")
    train = load_profile(str(profile)).train
    assert train.data == tmp_path / "a.jsonl"
    assert train.validation == Path("/rows/b.jsonl")
    train = load_profile(str(profile), {"train.data": "mine.jsonl"}).train
    assert train.data == Path("mine.jsonl")  # from where it is run


def test_without_rows_it_says_how_to_give_them(tmp_path) -> None:
    place = Workspace(tmp_path)
    profile = write_profile(tmp_path)
    done = place.step("train", "--profile", str(profile))
    assert done.returncode == EXIT_BAD_INPUT
    assert "has no section train" in done.stderr
    assert "-P data=FILE" in done.stderr
    done = place.step("train", "--profile", str(profile), "--data", "gone.jsonl")
    assert done.returncode == EXIT_BAD_INPUT
    assert "train.data: there is no file" in done.stderr


@pytest.mark.slow
def test_logged_as_checkpoint_and_adapter_or_merged(tmp_path, monkeypatch) -> None:
    place = Workspace(tmp_path)
    rows = write_rows(tmp_path / "tickets.jsonl", 0, 24)
    train = {"data": str(rows), "validation_share": 0, "log_as": "adapter", **SETTINGS}
    profile = write_profile(tmp_path, train=train, flavor="transformers")
    for step in ("fetch", "train", "log", "register"):
        done = place.step(step, "--profile", str(profile))
        assert done.returncode == 0, done.stdout + done.stderr
    write_profile(tmp_path, train={**train, "log_as": "merged"}, flavor="transformers")
    done = place.step("train", "--profile", str(profile))
    assert "cached=true" in done.stdout
    for step in ("log", "register"):
        done = place.step(step, "--profile", str(profile))
        assert done.returncode == 0, done.stdout + done.stderr
    place.enter(monkeypatch)
    versions = [registry.describe(registry.VersionName("tiny", number)) for number in "12"]
    assert [version.tags["logged_as"] for version in versions] == ["adapter", "merged"]
    # Both are computed with the same weights.
    assert versions[0].tags["artifact_sha256"] == versions[1].tags["artifact_sha256"]
    assert versions[0].tags["artifact_sha256"] == versions[0].tags["checkpoint_sha256"]
    text = mlflow.MlflowClient().get_model_version("tiny", "1").description
    assert "logged as the checkpoint before training with the adapter beside it" in text
    folders = [Path(mlflow.artifacts.download_artifacts(f"models:/tiny/{n}")) for n in "12"]
    assert (folders[0] / "peft" / "adapter_model.safetensors").is_file()
    assert not (folders[1] / "peft").exists()
    for folder in folders:
        assert not [*folder.rglob("training.json"), *folder.rglob("validation.jsonl")]
    # A base that is not the one it was trained on is noticed.
    (tmp_path / "checkpoint").rename(tmp_path / "first")
    make_tiny(tmp_path / "checkpoint", "phi-4-mini", seed=7)
    write_profile(tmp_path, train=train, flavor="transformers")
    assert place.step("fetch", "--profile", str(profile)).returncode == 0
    done = place.step("log", "--profile", str(profile), "--force", "true")
    assert done.returncode == EXIT_BAD_INPUT
    assert "was trained on another checkpoint" in done.stderr


@pytest.mark.slow
def test_several_processes_make_one_run(tmp_path, monkeypatch) -> None:
    place = Workspace(tmp_path)
    write_rows(tmp_path / "tickets.jsonl", 0, 24)
    train = {"data": "tickets.jsonl", "num_processes": 2, **SETTINGS}
    profile = write_profile(tmp_path, train=train)
    assert place.step("fetch", "--profile", str(profile)).returncode == 0
    done = place.step("train", "--profile", str(profile))
    assert done.returncode == EXIT_BAD_INPUT
    assert "train.num_processes is 2, and the step was started as one process" in done.stderr
    assert f"accelerate launch --num_processes 2 -m steps.train --profile {profile}" in done.stderr
    accelerate = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")
    plain = ("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
    torchrun = ("torch.distributed.run", "--nproc-per-node", "2")
    for launcher, cached in (((*accelerate, *plain), "false"), (torchrun, "true")):
        done = subprocess.run(
            [sys.executable, "-m", *launcher, "-m", "steps.train", "--profile", str(profile)],
            cwd=place.folder,
            env=place.whole_environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count(f"status=done cached={cached}") == 1
        assert "step=train" in done.stdout
    # What they have left is what the step by itself finds.
    done = place.step("train", "--profile", str(profile))
    assert "cached=true" in done.stdout, done.stdout + done.stderr
    place.enter(monkeypatch)
    client = registry.client()
    experiment = client.get_experiment_by_name("phi3-mlflow")
    runs = client.search_runs([experiment.experiment_id], "tags.step = 'train'")
    assert sorted(run.info.status for run in runs) == ["FAILED", "FINISHED", "FINISHED", "FINISHED"]
    report = json.loads((trained_by(place) / "training.json").read_text())
    assert report["settings"]["num_processes"] == 2
    assert report["steps"] == -(-report["train_rows"] // 16)


@pytest.mark.slow
def test_a_model_read_layer_by_layer_and_the_engine_in_the_key(tmp_path, monkeypatch) -> None:
    place = Workspace(tmp_path)
    write_rows(tmp_path / "tickets.jsonl", 0, 24)
    train = {"data": "tickets.jsonl", "validation_share": 0.2, **SETTINGS}
    profile = write_profile(tmp_path, train={**train, "engine": "streamed"})
    assert place.step("fetch", "--profile", str(profile)).returncode == 0
    done = place.step("train", "--profile", str(profile))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "read layer by layer (train.engine: streamed)" in done.stdout + done.stderr
    place.enter(monkeypatch)
    streamed = trained_by(place)
    validate_checkpoint(streamed)
    report = json.loads((streamed / "training.json").read_text())
    assert report["settings"]["engine"] == "streamed"
    known = json.loads((streamed / "provenance.json").read_text())
    assert known["training"]["settings"]["engine"] == "streamed"
    write_profile(tmp_path, train=train)  # the machine has room for a tiny model
    done = place.step("train", "--profile", str(profile))
    assert "with the whole model in memory" in done.stdout + done.stderr
    other = json.loads((trained_by(place) / "training.json").read_text())
    assert other["settings"] == {**report["settings"], "engine": "memory"}
    assert len(other["curve"]) == len(report["curve"])
    for point, in_memory in zip(report["curve"], other["curve"], strict=True):
        assert point == pytest.approx(in_memory, rel=1e-3)
    write_profile(tmp_path, train={**train, "engine": "memory"})
    done = place.step("train", "--profile", str(profile))
    assert "cached=true" in done.stdout, done.stdout + done.stderr


def test_the_engine_is_decided_by_the_machine_and_the_rows(tmp_path, monkeypatch) -> None:
    from phi3_mlflow.stages import engine
    from phi3_mlflow.stages.train import STEP
    from phi3_mlflow.training import memory

    rows = write_rows(tmp_path / "tickets.jsonl", 0, 24)
    profile = load_profile(str(write_profile(tmp_path, train={"data": str(rows)})))
    request = SimpleNamespace(profile=profile)
    checkpoint = SimpleNamespace(value=tmp_path / "checkpoint")
    inputs = TrainInputs(checkpoint, rows_input("train.data", rows), None)

    def decided(machine: int) -> str:
        monkeypatch.setattr(engine, "whole_memory", lambda: machine)
        return STEP.decided(request, inputs)["engine"]

    assert decided(64 * 10**9) == "memory"
    # Rows are short; of max_length, a batch of eight would not fit. A layer is nothing here.
    monkeypatch.setattr(memory, "_PARTS", 0)
    assert decided(1_350_000_000) == "memory"
    monkeypatch.setattr(engine, "_longest", lambda rows, chosen: chosen.max_length)
    assert decided(1_350_000_000) == "streamed"


def work_on(folder: Path, rows: Path) -> Any:
    """As much of a step's work as reads rows."""
    profile = load_profile(str(write_profile(folder, train={"data": str(rows)})))
    inputs = TrainInputs(None, rows_input("train.data", rows))
    return SimpleNamespace(request=SimpleNamespace(profile=profile), inputs=inputs)


def test_rows_that_change_between_the_key_and_the_reading(tmp_path) -> None:
    rows = write_rows(tmp_path / "tickets.jsonl", 0, 40)
    work = work_on(tmp_path, rows)
    assert len(_load(work).train) > 30
    write_rows(rows, 40, 41)
    with pytest.raises(UserError, match=r"tickets\.jsonl changed while it was read"):
        _load(work)


def test_only_the_step_by_itself_is_for_several_processes(tmp_path, monkeypatch) -> None:
    profile = load_profile(str(write_profile(tmp_path, train={"data": "a.jsonl"})))
    request = SimpleNamespace(profile=profile, value=lambda name: f"{name}.yaml")
    _require_processes(request)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"num_processes is 1, .* as 2 processes(.|\n)*Set it to 2"):
        _require_processes(request)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError, match=r"to do all steps\. Start the step train that way"):
        _require_processes(request)


def test_checks_that_are_none_are_told_before_any_work(tmp_path) -> None:
    rows = write_rows(tmp_path / "tickets.jsonl", 0, 40)
    write_rows(rows, 40, 41, check={"kind": "guess"})
    with pytest.raises(UserError, match=r"1 problem:\n  - line 41: check: found"):
        _load(work_on(tmp_path, rows))
