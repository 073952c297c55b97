"""The whole line on a tiny model: each step alone, all in `main`, again, and refused."""

from __future__ import annotations

import json
from pathlib import Path

import mlflow
import pytest

from phi3_mlflow.artifacts.records import RECORD_NAME
from phi3_mlflow.config.parameters import read_request
from phi3_mlflow.core.errors import EXIT_BAD_INPUT, EXIT_GATE
from phi3_mlflow.pipeline.step import carry_out
from phi3_mlflow.tracking import registry
from tests.conftest import Workspace
from tests.fixtures.tiny_line import write_profile

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, Path, str]:
    """`main` run once: the workspace, the profile, and what was printed."""
    place = Workspace(tmp_path_factory.mktemp("line"))
    profile = write_profile(place.folder)
    (place.folder / "checkpoint" / "LICENSE").write_text("Do as you like.\n")
    done = place.step("main", "--profile", str(profile))
    assert done.returncode == 0, done.stdout + done.stderr
    return place, profile, done.stdout + done.stderr


@pytest.fixture
def connected(line: tuple[Workspace, Path, str], monkeypatch: pytest.MonkeyPatch) -> Workspace:
    line[0].enter(monkeypatch)
    return line[0]


def test_main_ends_with_a_champion_that_answers(line, connected: Workspace) -> None:
    assert registry.alias_of("tiny", "champion") == "1"
    assert registry.alias_of("tiny", "challenger") == "1"
    model = mlflow.pyfunc.load_model("models:/tiny@champion")
    answer = model.predict({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3})
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["usage"]["completion_tokens"] <= 3


def test_the_models_licence_comes_with_it(line, connected: Workspace) -> None:
    files = Path(mlflow.artifacts.download_artifacts("models:/tiny@champion"))
    assert (files / "LICENSE.txt").read_text() == "Do as you like.\n"


def test_main_says_what_there_is_and_what_to_do_next(line) -> None:
    output = line[2]
    for words in (
        "champion     version 1",
        "KL divergence from full precision",
        "What is the capital of France?",
        "mlflow ui",
        "models serve",
        "phi-3-mini-4k",
    ):
        assert words in output, words
    assert "Traceback" not in output


def test_the_version_says_where_it_comes_from(line, connected: Workspace) -> None:
    version = registry.describe(registry.VersionName("tiny", "1"))
    for tag in registry.VERSION_TAGS:
        assert version.tags.get(tag), tag
    assert version.tags["algorithm"] == "rtn"
    assert version.tags["precision"] == "int4"
    assert version.tags["gate"] == "passed"
    assert len(version.tags["artifact_sha256"]) == 64
    assert "Licence**: MIT" in version.description
    assert version.description.startswith("none, int4 by rtn, flavor onnx\n")
    assert "**Gate**: passed, promote" in version.description
    assert 'load_model("models:/tiny/1")' in version.description
    assert "/artifacts/evaluation/1/report.html)" in version.description
    assert registry.client().get_registered_model("tiny").description.startswith("a tiny random")


def test_every_step_is_a_child_run_with_its_cost_and_manifest(line, connected: Workspace) -> None:
    client = registry.client()
    experiment = mlflow.get_experiment_by_name("phi3-mlflow")
    parent, *_ = client.search_runs([experiment.experiment_id], "tags.step = 'main'")
    children = client.search_runs(
        [experiment.experiment_id], f"tags.mlflow.parentRunId = '{parent.info.run_id}'"
    )
    assert parent.info.run_name == "main tiny"
    assert [m.model_id for m in parent.outputs.model_outputs], "its models are linked"
    assert parent.data.tags["model_versions"] == "models:/tiny/1"
    by_step = {run.data.tags["step"]: run for run in children}
    assert set(by_step) == {
        "fetch", "quantize", "export", "log", "register", "evaluate", "promote",
    }  # fmt: skip
    assert by_step["evaluate"].info.run_name == "evaluate v1"
    for step, run in by_step.items():
        assert (run.data.tags["outcome"], run.data.tags["exit_code"]) == ("done", "0")
        assert "None" not in run.data.params.values()
        assert run.info.status == "FINISHED"
        for metric in ("wall_time_s", "peak_rss_bytes", "bytes_read", "bytes_written"):
            assert metric in run.data.metrics, (step, metric)
        assert run.data.metrics["peak_rss_bytes"] > 10e6
        assert any(name.startswith("resolved.") for name in run.data.params), step
        listed = client.list_artifacts(run.info.run_id, "manifest")
        assert [f.path for f in listed] == [f"manifest/{step}.json"]
    file = mlflow.artifacts.download_artifacts(
        run_id=by_step["export"].info.run_id, artifact_path="manifest/export.json"
    )
    listed = {f["path"]: f for f in json.loads(Path(file).read_text())["files"]}
    assert {"model.onnx", "model.onnx.data", "genai_config.json"} <= set(listed)
    assert all(len(f["sha256"]) == 64 for f in listed.values())


def test_a_dry_run_says_what_would_be_done_and_why(line, connected: Workspace) -> None:
    place, profile, _ = line
    runs = len(registry.client().search_runs(["1"]))
    done = place.step("main", "--profile", str(profile), "--dry-run", "true")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("nothing to do, in the cache") == 6
    done = place.step("main", "--profile", str(profile), "--dry-run", "true", "--block-size", "16")
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.startswith("  ")}
    assert "nothing to do" in lines["fetch"]
    assert "settings.block_size (32 -> 16)" in lines["quantize"]
    assert "needs 0.7 GB of memory and, with the export, 0.0 GB of disk" in lines["quantize"]
    assert "MB of memory" in lines["quantize"]
    assert "its input would be new" in lines["export"]
    unknown = write_profile(place.folder, "tiny-unknown", licence="Apache-2.0")
    done = place.step("main", "--profile", str(unknown), "--dry-run", "true")
    first = "fetch     would run: it has not been done for this profile yet; needs 1 MB of disk"
    assert first in done.stdout
    assert len(registry.client().search_runs(["1"])) == runs


def test_a_forced_step_that_leaves_the_same_bytes_is_foreseen(line, connected: Workspace) -> None:
    place, profile, _ = line
    forced = ("main", "--profile", str(profile), "--force", "export")
    plan = place.step(*forced, "--dry-run", "true").stdout.splitlines()
    why = {line.split()[0]: line for line in plan if line.startswith("  ")}
    assert "would run: forced" in why["export"]
    for step in ("log", "register", "evaluate", "promote"):
        assert "unless the step before leaves the same bytes as the last time" in why[step]
    assert plan[-1] == "At most 5 of 7 steps would run."
    done = place.step(*forced)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cached=true") == 5, "export and promote ran"


def test_again_nothing_is_done(line, connected: Workspace) -> None:
    place, profile, _ = line
    before = len(registry.client().search_model_versions("name='tiny'"))
    done = place.step("main", "--profile", str(profile))
    assert done.returncode == 0, done.stderr
    assert "Nothing to do" in done.stderr
    assert done.stdout.count("cached=true") == 6
    assert len(registry.client().search_model_versions("name='tiny'")) == before


def test_each_step_alone_takes_what_the_one_before_left(line, connected: Workspace) -> None:
    place, profile, _ = line
    for step in ("quantize", "export", "log", "register", "evaluate", "promote"):
        done = place.step(step, "--profile", str(profile))
        assert done.returncode == 0, (step, done.stderr)
        assert f"step={step} status=done" in done.stdout


def test_a_step_takes_a_folder_that_is_named(line, connected: Workspace, tmp_path: Path) -> None:
    place, profile, _ = line
    checkpoint = place.folder / "checkpoint"
    done = place.step("quantize", "--profile", str(profile), "--checkpoint", str(checkpoint))
    assert done.returncode == 0, done.stderr
    done = place.step("quantize", "--profile", str(profile), "--checkpoint", str(tmp_path / "no"))
    assert done.returncode == EXIT_BAD_INPUT
    assert "there is no folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_equal_input_gives_equal_bytes(line, connected: Workspace) -> None:
    _, profile, _ = line
    values = {"profile": str(profile), "quiet": "true"}
    from phi3_mlflow.stages import export, quantize

    digests = []
    for _ in range(2):
        again = {**values, "force": "true"}
        made = [
            carry_out(module.STEP, read_request(module.STEP.parameters, again))
            for module in (quantize, export)
        ]
        assert not any(outcome.hit for outcome in made)
        digests.append([outcome.entry.manifest.digest for outcome in made])
    assert digests[0] == digests[1]


def test_the_gate_refuses_and_says_by_how_much(line, connected: Workspace) -> None:
    place, _, _ = line
    strict = {"thresholds": {"kl_mean": {"max": 1e-9}, "accuracy": {"min": 1}}}
    profile = write_profile(place.folder, "tiny-strict", gate=strict, registered_model="tiny")
    done = place.step("main", "--profile", str(profile), "--algorithm", "k_quant")
    assert done.returncode == EXIT_GATE, done.stdout + done.stderr
    assert "above the max 1e-09" in done.stderr
    assert "accuracy is 0, 1 below the min 1" in done.stderr
    assert "To try" in done.stderr
    assert "report.html" in done.stderr
    found = registry.client().search_runs(["1"], "tags.profile = 'tiny-strict'")
    refused = next(run for run in found if run.data.tags["step"] == "main")
    assert refused.data.metrics["kl_mean"] > 1e-9
    assert "stays with version 1" in done.stderr
    assert "Traceback" not in done.stderr
    assert registry.alias_of("tiny", "champion") == "1"
    assert registry.alias_of("tiny", "challenger") == "2"
    tags = registry.describe(registry.VersionName("tiny", "2")).tags
    assert tags["gate"] == "failed"
    assert "kl_mean" in tags["gate_reasons"]

    forced = place.step("promote", "--profile", str(profile), "--overrule", "true")
    assert forced.returncode == 0, forced.stderr
    assert "force=true" not in forced.stderr
    assert registry.alias_of("tiny", "champion") == "2"
    tags = registry.describe(registry.VersionName("tiny", "2")).tags
    assert (tags["promotion_forced"], tags["promoted_from"]) == ("true", "1")

    back = place.step("promote", "--profile", str(profile), "--action", "rollback")
    assert back.returncode == 0, back.stderr
    assert registry.alias_of("tiny", "champion") == "1"

    # What overruled the gate up to version 0.1.
    forced = place.step("promote", "--profile", str(profile), "--force", "true")
    assert forced.returncode == 0, forced.stderr
    assert "force=true of promote is called overrule=true now" in forced.stderr
    assert registry.alias_of("tiny", "champion") == "2"
    back = place.step("promote", "--profile", str(profile), "--action", "rollback")
    assert registry.alias_of("tiny", "champion") == "1"


def test_a_gate_that_is_off_is_said_everywhere(line, connected: Workspace) -> None:
    place, _, _ = line
    profile = write_profile(place.folder, "tiny-off", gate="off")
    done = place.step("main", "--profile", str(profile))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not gated" in done.stdout.splitlines()[-1]
    version = registry.describe(registry.VersionName("tiny-off", "1"))
    assert (version.tags["gate"], version.tags["gate_decision"]) == ("not gated", "promote")
    assert "**Gate**: not gated" in version.description
    assert registry.alias_of("tiny-off", "champion") == "1"


def test_a_profile_that_says_nothing_of_a_gate_has_one(line, connected: Workspace) -> None:
    place, _, _ = line
    # Greedy answers of random weights never end.
    profile = write_profile(place.folder, "tiny-silent", gate={})
    done = place.step("main", "--profile", str(profile))
    assert done.returncode == EXIT_GATE, done.stdout + done.stderr
    assert registry.describe(registry.VersionName("tiny-silent", "1")).tags["gate"] == "failed"
    assert registry.alias_of("tiny-silent", "champion") is None


def test_both_flavors_are_registered_and_measured_side_by_side(line, connected: Workspace) -> None:
    place, _, _ = line
    profile = write_profile(place.folder, "tiny-both", flavor="both")
    done = place.step("main", "--profile", str(profile))
    assert done.returncode == 0, done.stdout + done.stderr
    versions = {
        v.tags["flavor"]: v for v in registry.client().search_model_versions("name='tiny-both'")
    }
    assert set(versions) == {"onnx", "transformers"}
    assert registry.alias_of("tiny-both", "champion") == str(versions["onnx"].version)
    found = {flavor: float(version.tags["kl_mean"]) for flavor, version in versions.items()}
    assert found["transformers"] == 0
    assert found["onnx"] > 0
    request = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "temperature": 0.0}
    answers = [
        mlflow.pyfunc.load_model(f"models:/tiny-both/{version.version}").predict(request)
        for version in versions.values()
    ]
    assert answers[0].keys() == answers[1].keys()
    assert answers[0]["usage"]["prompt_tokens"] == answers[1]["usage"]["prompt_tokens"]


def test_a_model_that_was_deleted_is_logged_again(line, connected: Workspace) -> None:
    from phi3_mlflow.stages import log

    _, profile, _ = line
    request = read_request(log.STEP.parameters, {"profile": str(profile), "quiet": "true"})
    first = carry_out(log.STEP, request)
    assert first.hit
    model_id = first.record.models[0].model_id
    registry.client().delete_logged_model(model_id)
    second = carry_out(log.STEP, request)
    assert not second.hit
    record = json.loads((second.entry.path / RECORD_NAME).read_text())
    assert record["models"][0]["model_id"] != model_id


def test_the_same_model_is_one_version_and_no_alias_moves_by_itself(tmp_path: Path) -> None:
    place = Workspace(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        place.enter(patch)
        profile = write_profile(place.folder)
        for algorithm in ("rtn", "k_quant"):
            done = place.step(
                "main", "--profile", str(profile), "--algorithm", algorithm, "--flavor", "onnx"
            )
            assert done.returncode in (0, EXIT_GATE), done.stdout + done.stderr
        assert registry.alias_of("tiny", "challenger") == "2"
        # Nothing to do for the older one: it is not made the challenger by that.
        for more in ((), ("--force", "export"), ("--flavor", "both")):
            done = place.step("main", "--profile", str(profile), *more)
            assert done.returncode in (0, EXIT_GATE), done.stdout + done.stderr
            expected = "3" if more == ("--flavor", "both") else "2"
            found = registry.client().search_model_versions("name='tiny'")
            assert len(found) == int(expected)
            assert registry.alias_of("tiny", "challenger") == "2", more
        assert "challenger stays with version 2" in done.stderr
        contents = [(v.tags["artifact_sha256"], v.tags["flavor"]) for v in found]
        assert len(set(contents)) == len(contents)
        elsewhere = Workspace(tmp_path / ".." / tmp_path.name)  # the same store, spelled anew
        done = elsewhere.step("main", "--profile", str(profile), "--flavor", "both")
        assert done.returncode in (0, EXIT_GATE), done.stdout + done.stderr
        assert len(registry.client().search_model_versions("name='tiny'")) == 3
        done = place.step("register", "--profile", str(profile), "--force", "true")
        assert done.returncode == 0, done.stderr
        assert "moved back to it from version 2" in done.stderr
