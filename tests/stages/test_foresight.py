"""What a run will need is said, and a machine that is too small is refused, before the download."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.random_checkpoint import MODELS
from phi3_mlflow.artifacts.cache import StepCache
from phi3_mlflow.config.loading import load_profile, profile_names
from phi3_mlflow.config.parameters import read_request
from phi3_mlflow.config.profile import Profile
from phi3_mlflow.core import console
from phi3_mlflow.core.errors import EnvironmentProblem
from phi3_mlflow.core.rates import Rates, measure_rates
from phi3_mlflow.evaluation.batching import Expected
from phi3_mlflow.pipeline.step import carry_out
from phi3_mlflow.quantization.preflight import needs
from phi3_mlflow.stages import fetch, foreseen_training, foresight, main
from phi3_mlflow.stages.foreseen import Foreseen, Model, roughly
from phi3_mlflow.stages.foreseen_answers import layer_by_layer
from phi3_mlflow.stages.foresight import foresee, known_model, refuse_what_does_not_fit
from phi3_mlflow.training.memory import training_memory
from tests.conftest import Workspace
from tests.fixtures.tiny_line import write_profile
from tests.fixtures.tiny_phi3 import make_tiny

QUIET = Rates(products=5e10, memory=1e10, disk=5e8)


def model_of(name: str) -> Model:
    architecture = load_profile(name).architecture
    assert architecture is not None
    sizes = architecture.model_dump()
    return Model(sizes, sizes.pop("dtype"))


@pytest.mark.parametrize("name", MODELS)
def test_the_profiles_state_the_published_sizes(name: str) -> None:
    stated = load_profile(name).architecture
    assert stated is not None
    sizes = stated.model_dump(exclude={"dtype"})
    published = {"tie_word_embeddings": False, **MODELS[name]}
    assert sizes == {key: published[key] for key in sizes}


@pytest.mark.parametrize("name", profile_names())
def test_every_step_that_works_has_a_forecast(name: str) -> None:
    profile = load_profile(name)
    foreseen = foresee(profile, model_of(name), QUIET)
    trains = ["train"] if profile.train else []
    assert list(foreseen) == ["fetch", *trains, "quantize", "export", "log", "evaluate"]
    for step, needed in foreseen.items():
        assert needed.disk > 0
        assert (needed.seconds is None) == (step == "fetch")


def test_phi_3_mini_as_it_was_measured() -> None:
    foreseen = foresee(load_profile("phi-3-mini-4k"), model_of("phi-3-mini-4k"), QUIET)
    assert foreseen["fetch"].download == foreseen["fetch"].disk == 7_642_159_104
    results = json.loads(Path("benchmarks/results/quantize_memory.json").read_text())
    rows = {row[0]: row for row in results["table"]["rows"]}
    for step in ("quantize", "export"):
        _, peak, seconds, size, _ = rows[f"{step}, k_quant_mixed"]
        assert foreseen[step].memory > peak * 1e9
        assert foreseen[step].disk == pytest.approx(size * 1e9, rel=0.05)
        assert foreseen[step].seconds == pytest.approx(seconds, rel=1)


def rows_in(folder: Path, count: int, letters: int) -> Path:
    """Rows to train on, of so many letters each."""
    file = folder / "rows.jsonl"
    rows = [{"prompt": f"{n:06}" + "a" * (letters - 7), "completion": "b"} for n in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_training_as_it_was_measured(tmp_path: Path) -> None:
    changes = {"train.data": str(rows_in(tmp_path, 800, 160)), "train.validation_share": 0}
    profile = load_profile("smollm2-135m-tickets", {**changes, "train.rehearsal": None})
    assert profile.train is not None
    model = model_of("smollm2-135m-tickets")
    found = foresee(profile, model, QUIET)["train"]
    rows = foreseen_training.rows_here(profile.train)
    assert rows == foreseen_training.Rows(count=800, tokens=800 * 56, longest=56, validation=0)
    assert found.memory == training_memory(model.reader, profile.train, 56).total
    assert found.disk > model.nbytes
    # 300 steps of 8 rows with some 55 tokens: 3.5 to 4 s each.
    assert found.seconds == pytest.approx(300 * 3.75, rel=0.5)
    rehearsed = foresee(load_profile("smollm2-135m-tickets", changes), model, QUIET)["train"]
    assert (rehearsed.seconds or 0) > 1.5 * (found.seconds or 0)


def test_rows_that_are_elsewhere_tell_the_least(tmp_path: Path) -> None:
    here = load_profile("phi-3-mini-4k", {"train.data": str(rows_in(tmp_path, 20, 2000))})
    there = load_profile("phi-3-mini-4k", {"train.data": "s3://bucket/rows.jsonl"})
    model = model_of("phi-3-mini-4k")
    known, unknown = (foresee(one, model, QUIET)["train"] for one in (here, there))
    assert unknown.seconds is None
    assert known.seconds is not None
    assert unknown.memory <= known.memory
    assert unknown.disk == known.disk


@pytest.mark.parametrize(("machine", "engine"), [(64, "memory"), (16, "streamed")])
def test_the_engine_that_will_train_is_the_one_foreseen(
    machine: int, engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreseen_training, "whole_memory", lambda: machine * 10**9)
    monkeypatch.setattr(foreseen_training, "has_gpu", lambda: False)
    profile = load_profile("phi-3-mini-4k", {"train.data": str(rows_in(tmp_path, 20, 2000))})
    needed = foresee(profile, model_of("phi-3-mini-4k"), QUIET)["train"]
    assert (needed.memory < 4e9) == (engine == "streamed")
    assert needed.disk > 7_642_159_104, "the merged checkpoint"
    monkeypatch.setattr(foreseen_training, "has_gpu", lambda: True)
    on_gpu = foresee(profile, model_of("phi-3-mini-4k"), QUIET)["train"]
    assert (on_gpu.memory, on_gpu.seconds) == (0, None), "nothing is known of it"


def test_large_models_answer_together_and_sooner() -> None:
    name = "phi-3-mini-4k"
    alone = load_profile(name, {"evaluation.batch": 1})
    times = [
        foresee(p, model_of(name), QUIET)["evaluate"].seconds for p in (load_profile(name), alone)
    ]
    assert (times[0] or 0) < 0.9 * (times[1] or 0)


def tickets(folder: Path, **more: object) -> Profile:
    """A fine-tuned profile of Phi-3-mini with 2,000 rows, 200 of them set aside."""
    rows = {"train.data": str(rows_in(folder, 2000, 400)), "train.validation_share": 0.1}
    return load_profile("phi-3-mini-4k", {**rows, **more})


def test_a_fine_tuned_version_is_evaluated_beside_its_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("phi-3-mini-4k")
    monkeypatch.setattr(foreseen_training, "has_gpu", lambda: False)
    found = {}
    for free in (64, 20):
        monkeypatch.setattr(foresight, "available_memory", lambda free=free: free * 10**9)
        found[free] = foresee(tickets(tmp_path), model, QUIET)["evaluate"]
        plain = foresee(load_profile("phi-3-mini-4k"), model, QUIET)["evaluate"]
        # 200 rows are asked of the version, the base and the fine-tuned checkpoint.
        assert (found[free].seconds or 0) > (plain.seconds or 0) + 3 * 200 * 130 * 0.074
    assert found[64].memory > 4 * model.weights
    assert 2 * 2**30 < found[20].memory < 5e9, "in passes: keys, values and a few megabytes"
    little = foresee(tickets(tmp_path, **{"evaluation.task_rows": 20}), model, QUIET)["evaluate"]
    assert (little.seconds or 0) < 0.5 * (found[20].seconds or 0)


@pytest.mark.parametrize(
    ("size", "wanted", "free", "more"),
    [
        ("full", "auto", 64, True),
        ("full", "auto", 20, False),
        ("full", "always", 20, True),
        ("full", "never", 64, False),
        ("quick", "always", 64, False),
    ],
)
def test_answers_of_the_reference_are_foreseen_where_they_are_asked_for(
    size: str, wanted: str, free: int, more: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foresight, "available_memory", lambda: free * 10**9)
    sizes = {"evaluation.size": size, "evaluation.reference_answers": wanted}
    model = model_of("phi-3-mini-4k")
    asked = foresee(load_profile("phi-3-mini-4k", sizes), model, QUIET)["evaluate"]
    never = {**sizes, "evaluation.reference_answers": "never"}
    without = foresee(load_profile("phi-3-mini-4k", never), model, QUIET)["evaluate"]
    assert ((asked.seconds or 0) > 1.2 * (without.seconds or 0)) is more
    if free < 32:
        assert asked.memory < 8e9


def test_weights_that_no_cache_holds_are_read_from_the_disk_for_every_pass() -> None:
    model, asked = model_of("phi-3-mini-4k"), [Expected(50, 40)] * 10
    cached, read = (
        layer_by_layer(model, asked, QUIET, free * 10**9) for free in (14, 9)
    )  # fmt: skip
    assert read - cached > 15 * model.nbytes / QUIET.disk, "some twenty passes"


def test_main_refuses_to_train_before_the_download(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foresight, "available_memory", lambda: 7 * 10**9)
    monkeypatch.setattr(foreseen_training, "has_gpu", lambda: False)
    monkeypatch.setattr(fetch.Fetch, "work", lambda *given: pytest.fail("it was fetched"))
    rows = rows_in(workspace.folder, 20, 2000)
    file = workspace.folder / "mine.yaml"
    text = (Path(__file__).parents[2] / "configs" / "phi-3-mini-4k.yaml").read_text()
    assert "\ntrain:" in text
    file.write_text(text.replace("\ntrain:", f"\ntrain:\n  data: {rows}\n  engine: memory"))
    request = read_request(main.COMMAND.parameters, {"profile": str(file)})
    with pytest.raises(EnvironmentProblem, match=r"train needs 1.* GB of memory, 7\.0 GB are"):
        main.COMMAND.run(request)


def test_a_search_costs_every_candidate() -> None:
    name = "phi-3-mini-4k"
    one = foresee(load_profile(name), model_of(name), QUIET)
    searched = load_profile(name, {"quantization.algorithm": "search"})
    all_of_them = foresee(searched, model_of(name), QUIET)
    assert "quantize" not in all_of_them
    assert (all_of_them["search"].seconds or 0) > 2 * (one["quantize"].seconds or 0)


def test_the_sizes_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    checkpoint = make_tiny(tmp_path, "phi-4-mini")
    profile = load_profile("phi-4-mini", {"quantization.block_size": 16})
    model = Model(json.loads((checkpoint / "config.json").read_text()), "F32")
    weights = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    assert model.nbytes == pytest.approx(weights, abs=5000)
    found = foresee(profile, model, QUIET)
    expected = needs(checkpoint, profile.quantization)
    assert found["quantize"].memory == expected.memory
    assert found["quantize"].disk + found["export"].disk == expected.disk


def test_what_is_fetched_is_known_by_its_config(workspace: Workspace) -> None:
    profile = write_profile(workspace.folder)
    request = read_request(("profile", "source"), {"profile": str(profile)})
    assert known_model(request, StepCache(workspace.cache)) is None
    carry_out(fetch.STEP, read_request(fetch.STEP.parameters, {"profile": str(profile)}))
    model = known_model(request, StepCache(workspace.cache))
    assert model is not None
    assert model.hidden == 128


def test_the_sizes_in_a_profile_are_those_of_its_own_source(workspace: Workspace) -> None:
    given = {"profile": "phi-3-mini-4k"}
    assert (
        known_model(read_request(("profile", "source"), given), StepCache(workspace.cache))
        is not None
    )
    other = read_request(("profile", "source"), {**given, "source": "file:/elsewhere"})
    assert known_model(other, StepCache(workspace.cache)) is None


def test_too_little_of_both_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foresight, "available_memory", lambda: 2 * 10**9)
    monkeypatch.setattr(foresight, "free_disk", lambda path: 3 * 10**9)
    profile = load_profile("phi-3-mini-4k")
    wanted = {
        "quantize": Foreseen(memory=10**9, disk=2 * 10**9),
        "evaluate": Foreseen(memory=5 * 10**9, disk=2 * 10**9),
    }
    with pytest.raises(EnvironmentProblem) as caught:
        refuse_what_does_not_fit(profile, wanted, tmp_path)
    message = str(caught.value)
    assert "evaluate needs 5.0 GB of memory, 2.0 GB are available" in message
    assert "all steps together need 4.0 GB of disk, 3.0 GB are free" in message
    assert "quantize needs" not in message
    assert "PHI3_MLFLOW_CACHE" in message
    refuse_what_does_not_fit(profile, {"quantize": wanted["quantize"]}, tmp_path)


def test_times_are_said_as_roughly_as_they_are_known() -> None:
    said = [roughly(seconds) for seconds in (0.2, 44.4, 100, 3000, 10_000)]
    assert said == ["some 1 s", "some 44 s", "some 2 min", "some 50 min", "some 2.8 h"]
    assert str(Foreseen(memory=2 * 10**9, disk=10**6, seconds=30)) == "2.0 GB of memory, some 30 s"


def test_this_machine_has_rates(tmp_path: Path) -> None:
    rates = measure_rates(tmp_path / "not" / "there")
    assert min(rates.products, rates.memory, rates.disk) > 0


def test_main_refuses_before_the_download(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(foresight, "available_memory", lambda: 3 * 10**9)
    monkeypatch.setattr(fetch.Fetch, "work", lambda *given: pytest.fail("it was fetched"))
    console.set_quiet(False)
    request = read_request(main.COMMAND.parameters, {"profile": "phi-3-mini-4k"})
    with pytest.raises(EnvironmentProblem, match=r"evaluate needs .* GB of memory, 3\.0 GB are"):
        main.COMMAND.run(request)
    said = capsys.readouterr().err
    assert "This run needs, beside what is in the cache:" in said
    assert "fetch     7.6 GB of disk, 7.6 GB of download" in said


def test_a_dry_run_says_it_of_every_step(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def offline(*given: object, **more: object) -> None:
        raise EnvironmentProblem("no connection")

    monkeypatch.setattr("phi3_mlflow.sources.fetch.size_of_source", offline)
    given = {"profile": "phi-3-mini-4k", "dry_run": "true"}
    main.COMMAND.run(read_request(main.COMMAND.parameters, given))
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert "needs 7.6 GB of disk, 7.6 GB of download" in lines["fetch"]
    for step in ("quantize", "export", "log", "evaluate"):
        assert "would run: its input would be new; needs " in lines[step]
        assert " GB of disk, some " in lines[step]
