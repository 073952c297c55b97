"""What a run will need is said, and a machine that is too small is refused, before the download."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.random_checkpoint import MODELS
from phi3_mlflow.artifacts.cache import StepCache
from phi3_mlflow.config.loading import load_profile, profile_names
from phi3_mlflow.config.parameters import read_request
from phi3_mlflow.core import console
from phi3_mlflow.core.errors import EnvironmentProblem
from phi3_mlflow.core.rates import Rates, measure_rates
from phi3_mlflow.pipeline.step import carry_out
from phi3_mlflow.quantization.preflight import needs
from phi3_mlflow.stages import fetch, foresight, main
from phi3_mlflow.stages.foresight import (
    Foreseen,
    Model,
    foresee,
    known_model,
    refuse_what_does_not_fit,
    roughly,
)
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
    foreseen = foresee(load_profile(name), model_of(name), QUIET)
    assert list(foreseen) == ["fetch", "quantize", "export", "log", "evaluate"]
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
