"""Try the quantizations that the profile lists, and keep the best that fits its budget.

    mlflow run . --env-manager local -P algorithm=search
    python -m steps.search --profile smollm2-135m

Every candidate is quantized, exported and measured against full precision on held-out text: the
divergence (KL), perplexity, agreement on the likeliest token, size and speed. Each is a child run;
the run of the search shows them in one plot, quality against size. What the best one left is what
the next step takes. Nothing is measured twice.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from phi3_mlflow.config.parameters import Request
from phi3_mlflow.core import console
from phi3_mlflow.core.errors import UserError
from phi3_mlflow.evaluation import datasets
from phi3_mlflow.pipeline.inputs import full_precision
from phi3_mlflow.pipeline.runner import Pipeline
from phi3_mlflow.pipeline.step import Settings, Step, Work, step_parameters
from phi3_mlflow.quantization.search import CandidateMetrics, Ranked, search
from phi3_mlflow.stages import export, quantize
from phi3_mlflow.stages.records import CandidateRecord, CandidateRow, SearchRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from phi3_mlflow.artifacts.cache import StepCache
    from phi3_mlflow.artifacts.inputs import Folder
    from phi3_mlflow.config.profile import Profile
    from phi3_mlflow.evaluation.items import HeldoutText
    from phi3_mlflow.quantization.settings import QuantizationSettings


@dataclass(frozen=True)
class SearchInputs:
    """A float checkpoint."""

    checkpoint: Folder


class Search(Step[SearchInputs, SearchRecord]):
    """Checkpoint to the best of the profile's candidates."""

    name = "search"
    doing = "trying the quantizations that the profile lists"
    parameters = step_parameters("checkpoint")
    record_type = SearchRecord

    def inputs(self, request: Request, cache: StepCache) -> SearchInputs:
        return search_inputs(request, cache)

    def settings(self, request: Request) -> Settings:
        wanted = request.profile.search
        return {
            "candidates": {
                name: quantize.quantization_values(chosen)
                for name, chosen in wanted.candidates.items()
            },
            "budget": wanted.budget.model_dump(mode="json"),
            **measured_on(request),
        }

    def work(self, work: Work[SearchInputs]) -> None:
        request = work.request
        checkpoint = work.inputs.checkpoint.value
        places = {name: at for at, name in enumerate(request.profile.search.candidates, start=1)}

        def measure(name: str, _: QuantizationSettings) -> CandidateMetrics:
            console.say(f"search: candidate {name} ({places[name]} of {len(places)})")
            with Pipeline(tried(request, name), work.run.run_id) as pipeline:
                done = pipeline.run(TriedCandidate(name), checkpoint=checkpoint)
            return CandidateMetrics(**done.record.model_dump())

        ranking = search(request.profile.search.candidates, measure, request.profile.search.budget)
        rows = [_row(one) for one in ranking.candidates]
        work.run.log_search([row.model_dump() for row in rows], _plot(rows))
        console.say(_table(rows))
        best = ranking.best
        work.metrics.update(_metrics(best.measurement))
        SearchRecord(best=best.name, candidates=tuple(rows)).write(work.out)
        # So that the next step, run by itself, takes the best and not the last that was tried.
        values = {**request.values, "force": "false"}
        again = Request(as_profile(request.profile, best.name), values)
        with Pipeline(again, work.run.run_id) as pipeline:
            int4 = pipeline.run(quantize.STEP, checkpoint=checkpoint)
            pipeline.run(export.STEP, checkpoint=int4.entry.path)


class TriedCandidate(Step[SearchInputs, CandidateRecord]):
    """Making and measuring one candidate: a run of its own, and done once.

    It is given a profile with the candidate's settings.

    Args:
        label: the candidate's name.
    """

    name = "candidate"
    parameters = step_parameters("checkpoint")
    record_type = CandidateRecord
    in_main_process = True

    def __init__(self, label: str) -> None:
        self._label = label

    @property
    def doing(self) -> str:  # type: ignore[override]
        """What it does, with the candidate's name."""
        return f"making and measuring {self._label}"

    def inputs(self, request: Request, cache: StepCache) -> SearchInputs:
        return search_inputs(request, cache)

    def settings(self, request: Request) -> Settings:
        chosen = quantize.quantization_values(request.profile.quantization)
        return {"quantization": chosen, **measured_on(request)}

    def work(self, work: Work[SearchInputs]) -> None:
        work.run.rename(self._label)
        measured = build_and_measure(work)
        work.metrics.update(_metrics(measured))
        CandidateRecord(**asdict(measured)).write(work.out)


def search_inputs(request: Request, cache: StepCache) -> SearchInputs:
    """The float checkpoint.

    Raises:
        UserError: there is none, or the profile quantizes nothing.
    """
    if not request.profile.quantizes:
        raise UserError(
            f"search has nothing to do for flavor {request.profile.flavor} with precision "
            f"{request.profile.precision}: only the ONNX flavor in int4 is quantized"
        )
    return SearchInputs(full_precision(request, cache))


def tried(request: Request, name: str) -> Request:
    """What is asked of the steps that make a candidate."""
    force = "all" if request.flag("force") else "false"
    return Request(as_profile(request.profile, name), {**request.values, "force": force})


def build_and_measure(work: Work[SearchInputs]) -> CandidateMetrics:
    """Quantize and export by the profile's settings, and compare with full precision."""
    from phi3_mlflow.evaluation.measure import diverge
    from phi3_mlflow.evaluation.speed import decode_speed

    profile = work.request.profile
    checkpoint = work.inputs.checkpoint.value
    force = "all" if work.request.flag("force") else "false"
    request = replace(work.request, values={**work.request.values, "force": force})
    with Pipeline(request, work.run.run_id) as pipeline:
        int4 = pipeline.run(quantize.STEP, checkpoint=checkpoint)
        onnx = pipeline.run(export.STEP, checkpoint=int4.entry.path).entry.path
    window = profile.window
    found = diverge(checkpoint, onnx, texts(profile), window, store=work.cache).metrics()
    return CandidateMetrics(
        kl_mean=found["kl_mean"],
        top1_agreement=found["top1_agreement"],
        perplexity=found["perplexity"],
        data_bytes=sum(file.stat().st_size for file in onnx.glob("*.onnx.data")),
        tokens_per_second=decode_speed(onnx, threads=profile.runtime.threads),
    )


def texts(profile: Profile) -> list[HeldoutText]:
    """The held-out texts that candidates are compared on.

    Of the project's own set those that the quick evaluation leaves out, the shortest of every
    register: the gate does not judge a choice by what it was made on.
    """
    chosen = profile.evaluation
    if chosen.texts != "auto":
        return datasets.load_heldout(chosen.texts)
    shortest: dict[str, HeldoutText] = {}
    for text in sorted(datasets.load_heldout(), key=lambda text: len(text.text)):
        if not text.quick:
            shortest.setdefault(text.register_, text)
    return sorted(shortest.values(), key=lambda text: text.id)


def as_profile(profile: Profile, name: str) -> Profile:
    """The profile with a candidate's settings in place of the search."""
    return profile.model_copy(
        update={
            "quantization": profile.search.candidates[name],
            "search": profile.search.model_copy(update={"on": False}),
        }
    )


def measured_on(request: Request) -> dict[str, Any]:
    """What decides the metrics of a candidate beside its settings."""
    return {
        "texts_sha256": datasets.digest(texts(request.profile)),
        "window": request.profile.window,
    }


def _metrics(found: CandidateMetrics | None) -> dict[str, float]:
    return {} if found is None else {name: float(v) for name, v in asdict(found).items()}


def _row(one: Ranked) -> CandidateRow:
    row = CandidateRow(
        candidate=one.name,
        algorithm=one.settings.algorithm,
        within_budget=not one.reasons,
        on_front=one.on_front,
        reasons="; ".join(one.reasons),
    )
    return row.model_copy(update=_metrics(one.measurement))


def _table(rows: list[CandidateRow]) -> str:
    lines = [
        f"  {'candidate':<24} {'KL':>7} {'top-1':>6} {'perplexity':>10} {'MB':>9} {'tok/s':>7}"
    ]
    for row in rows:
        if row.kl_mean is None:
            lines.append(f"  {row.candidate:<24} failed: {row.reasons.splitlines()[0]}")
            continue
        lines.append(
            f"  {row.candidate:<24} {row.kl_mean:>7.4f} {row.top1_agreement:>6.3f} "
            f"{row.perplexity:>10.2f} {(row.data_bytes or 0) / 1e6:>9.1f} "
            f"{row.tokens_per_second:>7.1f}  {row.reasons}".rstrip()
        )
    return "\n".join(lines)


def _plot(rows: list[CandidateRow]) -> Figure:
    from phi3_mlflow.evaluation.report.candidates import pareto

    return pareto([row.model_dump() for row in rows if row.kl_mean is not None])


STEP = Search()
