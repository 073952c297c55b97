"""The main job on the embedded default, through `mlflow run`, as the README has it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phi3_mlflow.config.loading import load_profile, profile_names
from tests.conftest import ROOT, Workspace

pytestmark = pytest.mark.slow

ASK = """
import json, sys, mlflow
assert not any("phi3_mlflow" in name for name in sys.modules)
model = mlflow.pyfunc.load_model("models:/smollm2-135m@champion")
request = {"messages": [{"role": "user", "content": "What is the capital of France?"}],
           "max_tokens": 32, "temperature": 0}
print(json.dumps([model.predict(request), model.predict(request)]))
"""


def test_the_champion_answers_in_a_process_that_knows_nothing_of_the_project(
    default_run: tuple[Workspace, str], tmp_path: Path
) -> None:
    place, _ = default_run
    script = tmp_path / "ask.py"
    script.write_text(ASK)
    done = place.run("env", "-u", "PYTHONPATH", "python", str(script), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answer, again = json.loads(done.stdout.splitlines()[-1])
    choice = answer["choices"][0]
    assert "Paris" in choice["message"]["content"]
    assert choice["message"]["content"] == again["choices"][0]["message"]["content"]
    assert choice["finish_reason"] in ("stop", "length")
    assert answer["usage"]["completion_tokens"] <= 32
    assert (
        answer["usage"]["total_tokens"]
        == answer["usage"]["prompt_tokens"] + answer["usage"]["completion_tokens"]
    )


def test_what_was_measured_is_what_int4_can_do(default_run: tuple[Workspace, str]) -> None:
    from phi3_mlflow.artifacts.cache import StepCache

    place, output = default_run
    evaluated = next(
        (StepCache(place.cache).root / "outputs/evaluate").glob("*/output/*/metrics.json")
    )
    metrics = json.loads(evaluated.read_text())
    assert 0 < metrics["kl_mean"] < 0.3
    assert metrics["top1_agreement"] > 0.7
    assert 1 < metrics["perplexity_reference"] < metrics["perplexity"]
    assert metrics["accuracy"] > 0.2
    assert metrics["peak_memory_bytes"] > metrics["size_bytes"] > 50e6
    for words in ("champion     version 1", "What is the capital of France?", "Paris", "mlflow ui"):
        assert words in output, words
    assert "Traceback" not in output


def test_the_evaluation_shows_in_mlflow(default_run: tuple[Workspace, str]) -> None:
    """The report, the plots, the verdict and the sets with the step's run; the answers below it."""
    from mlflow import MlflowClient

    client = MlflowClient(default_run[0].tracking_uri)
    version = client.get_model_version("smollm2-135m", "1")
    run = client.get_run(version.tags["evaluation_run"])
    logged = {
        file.path for folder in ("evaluation/1", "figures/version-1")
        for file in client.list_artifacts(run.info.run_id, folder)
    }  # fmt: skip
    for name in ("report.html", "verdict.json", "verdict.xml", "answers.jsonl", "texts.jsonl"):
        assert f"evaluation/1/{name}" in logged, logged
    for name in ("quality", "categories", "latency", "divergence"):
        assert f"figures/version-1/{name}.png" in logged, logged
    assert {given.dataset.name for given in run.inputs.dataset_inputs} == {
        "questions", "held-out texts",
    }  # fmt: skip
    (answers,) = client.search_runs(
        [run.info.experiment_id], f"tags.mlflow.parentRunId = '{run.info.run_id}'"
    )
    assert answers.data.tags["mlflow.runType"] == "genai_evaluate"
    assert answers.data.metrics["correct/mean"] == pytest.approx(run.data.metrics["accuracy"])
    assert answers.data.metrics["ended/mean"] == pytest.approx(1 - run.data.metrics["endless_rate"])
    for words in ("**Intended use**", "**Licence**", "**Training data**", "Measured on"):
        assert words in version.description, words


def test_what_was_built_is_what_the_profile_asks_for(real_onnx: Path) -> None:
    from phi3_mlflow.genai.check import check_export

    report = check_export(real_onnx, load_profile("smollm2-135m").quantization)
    assert report.int4_nodes > report.int8_nodes > 0
    assert report.float_matmuls == 0
    assert tuple(report.accuracy_levels) == (4,)


def test_an_unknown_profile_fails_the_run_with_the_message(
    default_run: tuple[Workspace, str],
) -> None:
    done = default_run[0].run(
        "mlflow", "run", str(ROOT), "-e", "fetch", "-P", "profile=nonsense",
        "--env-manager", "local",
    )  # fmt: skip
    assert done.returncode != 0
    assert "there is no profile 'nonsense'" in done.stderr
    assert ", ".join(profile_names()) in done.stderr
