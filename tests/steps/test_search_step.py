"""The search among quantizations: candidates as runs, a choice within the budget, nothing twice."""

from __future__ import annotations

import json
from pathlib import Path

import mlflow
import pytest

from phi3_mlflow.artifacts.cache import StepCache
from phi3_mlflow.config.loading import load_profile
from phi3_mlflow.core.errors import EXIT_BAD_INPUT, UserError
from phi3_mlflow.evaluation.report.candidates import pareto
from phi3_mlflow.tracking import registry
from tests.conftest import Workspace
from tests.fixtures.tiny_line import write_profile

CANDIDATES = {
    "coarse": {"algorithm": "rtn", "block_size": 32},
    "fine": {"algorithm": "k_quant", "block_size": 16},
    "impossible": {"algorithm": "k_quant_mixed", "mixed_layers": [7]},
}


def found_by(place: Workspace) -> dict[str, dict]:
    """The record of the search that was last done."""
    entry = StepCache(place.cache).latest("tiny", "search")
    assert entry is not None
    record = json.loads((entry.path / "record.json").read_text())
    return {"best": record["best"], **{row["candidate"]: row for row in record["candidates"]}}


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, Path, str]:
    place = Workspace(tmp_path_factory.mktemp("search"))
    profile = write_profile(place.folder, search={"candidates": CANDIDATES})
    done = place.step("main", "--profile", str(profile), "--algorithm", "search")
    assert done.returncode == 0, done.stdout + done.stderr
    return place, profile, done.stdout + done.stderr


@pytest.fixture
def connected(searched: tuple[Workspace, Path, str], monkeypatch: pytest.MonkeyPatch) -> Workspace:
    searched[0].enter(monkeypatch)
    return searched[0]


@pytest.mark.slow
def test_main_goes_on_with_the_best_candidate(searched, connected: Workspace) -> None:
    found = found_by(connected)
    assert found["best"] == "fine"
    assert found["fine"]["kl_mean"] < found["coarse"]["kl_mean"]
    version = registry.describe(registry.VersionName("tiny", "1"))
    assert version.tags["algorithm"] == "k_quant"
    assert registry.alias_of("tiny", "champion") == "1"


@pytest.mark.slow
def test_a_candidate_that_cannot_be_made_costs_the_others_nothing(searched) -> None:
    place, _, output = searched
    row = found_by(place)["impossible"]
    assert row["kl_mean"] is None
    assert not row["within_budget"]
    assert "impossible" in output
    assert "mixed_layers" in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_every_candidate_is_a_child_run_with_its_figures(searched, connected: Workspace) -> None:
    client = registry.client()
    experiment = mlflow.get_experiment_by_name("phi3-mlflow")
    (run,) = client.search_runs([experiment.experiment_id], "tags.step = 'search'")
    children = client.search_runs(
        [experiment.experiment_id], f"tags.mlflow.parentRunId = '{run.info.run_id}'"
    )
    candidates = {c.info.run_name: c for c in children if c.data.tags["step"] == "candidate"}
    assert set(candidates) == set(CANDIDATES)
    assert candidates["impossible"].info.status == "FAILED"
    found = found_by(connected)
    for name in ("coarse", "fine"):
        for metric in ("kl_mean", "top1_agreement", "perplexity", "data_bytes"):
            assert candidates[name].data.metrics[metric] == pytest.approx(found[name][metric])
        assert candidates[name].data.metrics["tokens_per_second"] > 0
    files = {f.path for f in client.list_artifacts(run.info.run_id, "search")}
    assert files == {"search/candidates.json", "search/pareto.png"}


@pytest.mark.slow
def test_nothing_is_measured_twice(searched) -> None:
    place, profile, _ = searched
    again = place.step("main", "--profile", str(profile), "--algorithm", "search")
    assert again.returncode == 0, again.stderr
    assert "Nothing to do" in again.stdout + again.stderr
    assert "candidate" not in again.stderr
    told = place.step(
        "main", "--profile", str(profile), "--algorithm", "search", "--dry-run", "true"
    )
    assert "search" in told.stdout
    # One candidate less: those that were measured are not measured again.
    fewer = {name: CANDIDATES[name] for name in ("coarse", "fine")}
    write_profile(place.folder, search={"candidates": fewer})
    done = place.step("search", "--profile", str(profile))
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count("candidate: nothing to do") == 2
    assert found_by(place)["best"] == "fine"
    latest = StepCache(place.cache).latest("tiny", "quantize")
    assert latest is not None
    assert '"k_quant"' in (latest.path / "provenance.json").read_text()


@pytest.mark.slow
def test_without_a_candidate_within_the_budget_nothing_is_chosen(tmp_path: Path) -> None:
    place = Workspace(tmp_path)
    candidates = {"coarse": CANDIDATES["coarse"]}
    budget = {"data_bytes": 1000, "kl_mean": 1e-9}
    profile = write_profile(place.folder, search={"candidates": candidates, "budget": budget})
    done = place.step("main", "--profile", str(profile), "--algorithm", "search")
    assert done.returncode == EXIT_BAD_INPUT
    assert "no candidate keeps to the budget" in done.stderr
    assert "bytes over the budget of 1,000" in done.stderr
    assert StepCache(place.cache).latest("tiny", "quantize") is not None  # what was tried is kept


def test_a_named_algorithm_is_not_searched_for(tmp_path: Path) -> None:
    profile = str(write_profile(tmp_path, quantization={"algorithm": "search"}))
    assert load_profile(profile).search.on
    overridden = load_profile(profile, {"quantization.algorithm": "rtn"})
    assert not overridden.search.on
    assert overridden.quantization.algorithm == "rtn"
    assert load_profile("smollm2-135m", {"quantization.algorithm": "search"}).search.on


def test_candidates_are_checked_with_the_profile(tmp_path: Path) -> None:
    wrong = {"candidates": {"one": {"algorithm": "rtm"}}, "budget": {"megabytes": 3}}
    profile = str(write_profile(tmp_path, search=wrong))
    with pytest.raises(UserError) as told:
        load_profile(profile)
    assert "search.candidates.one.algorithm" in str(told.value)
    assert "search.budget.megabytes" in str(told.value)


def test_the_plot_shows_every_candidate() -> None:
    rows = [
        {"candidate": "a", "data_bytes": 2e6, "kl_mean": 0.1, "tokens_per_second": 9.0,
         "on_front": True, "within_budget": True},
        {"candidate": "b", "data_bytes": 3e6, "kl_mean": 0.2, "tokens_per_second": 5.0,
         "on_front": False, "within_budget": False},
    ]  # fmt: skip
    figure = pareto(rows)
    shown = {text.get_text() for text in figure.axes[0].texts}
    assert shown == {"a", "b"}
    legend = figure.axes[0].get_legend()
    assert {t.get_text() for t in legend.get_texts()} == {
        "not beaten in both", "beyond the budget", "chosen",
    }  # fmt: skip
