"""Measure versions against the full-precision checkpoint, and say whether they pass the gate.

    mlflow run . -e evaluate -P profile=smollm2-135m
    python -m steps.evaluate --profile smollm2-135m --version 3 --size full
    python -m steps.evaluate --questions mine.csv

Measured: perplexity, KL divergence and top-1 agreement on held-out text, the share of questions
answered right, speed, memory. The profile's thresholds and the comparison with the champion, on
the same questions and texts, decide. The version gets the tag `gate` and the reasons; the run the
figures, every answer, the verdict as JSON and JUnit XML, and report.html, which needs no network.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phi3_mlflow.artifacts.cache import Entry, StepCache
from phi3_mlflow.config.parameters import AUTO, Request
from phi3_mlflow.core import console
from phi3_mlflow.evaluation import datasets
from phi3_mlflow.evaluation.figures import HEADLINE
from phi3_mlflow.evaluation.judge import check_judge
from phi3_mlflow.evaluation.report.build import TEXTS_TAG
from phi3_mlflow.evaluation.rows import HeldoutText, Needle, Question
from phi3_mlflow.pipeline.step import (
    CHECKPOINT,
    Input,
    Step,
    Work,
    folder_input,
    preceding_output,
    read_record,
)
from phi3_mlflow.stages.card import model_card
from phi3_mlflow.tracking import registry
from phi3_mlflow.tracking.runs import tracking_identity


def inputs(request: Request, store: StepCache) -> dict[str, Input]:
    reference = folder_input(request, store, "checkpoint", "fetch", CHECKPOINT)
    versions = _versions(request, store)
    champions = [registry.champion_to_beat(version) for version in versions]
    return {
        "version": _input(versions),
        "champion": _input([champion for champion in champions if champion]),
        "checkpoint": reference,
    }


def _input(versions: Sequence[registry.VersionName]) -> Input:
    digest = " ".join(f"{version.uri}#{registry.content(version)}" for version in versions)
    return Input(" ".join(version.uri for version in versions), digest)


def _versions(request: Request, store: StepCache) -> list[registry.VersionName]:
    """The named versions; `auto` is the challenger, or all of `register`'s for flavor both."""
    name = request.profile.registered_model
    if not request.is_auto("version"):
        return [
            registry.find_version(text, name)
            for text in request.value("version").replace(",", " ").split()
        ]
    if request.profile.flavor != "both":
        return [registry.find_version(AUTO, name)]
    entry = preceding_output(request, store, "version", "register")
    return [registry.VersionName(v["name"], v["version"]) for v in read_record(entry)["versions"]]


def _source(setting: str) -> str | None:
    return None if setting == AUTO else setting


def questions(request: Request) -> list[Question]:
    chosen = request.profile.evaluation
    return datasets.load_questions(_source(chosen.questions), quick=chosen.size == "quick")


def texts(request: Request) -> list[HeldoutText]:
    chosen = request.profile.evaluation
    return datasets.load_heldout(_source(chosen.texts), quick=chosen.size == "quick")


def needles(request: Request) -> list[Needle]:
    """Long prompts, which take minutes: in size full only, not beside a user's own questions."""
    chosen = request.profile.evaluation
    asked = chosen.size == "full" and chosen.questions == AUTO
    return datasets.load_needles() if asked else []


def settings(request: Request) -> dict[str, Any]:
    from phi3_mlflow.evaluation.measure import Sets

    profile = request.profile
    context = profile.runtime.max_context or profile.context_length
    sets = Sets(questions(request), texts(request), needles(request), context)
    gate = profile.gate.model_dump(mode="json", exclude_none=True)
    judge = profile.evaluation.judge
    return {
        "window": profile.evaluation.window,
        "judge": judge.model_dump(mode="json") if judge else {},
        **sets.digests(),
        "thresholds": gate["thresholds"],
        "champion_margins": gate["champion"],
        "tracking": tracking_identity(),
    }


def work(work: Work) -> None:
    import mlflow

    from phi3_mlflow.evaluation.evaluate import Evaluator

    request, profile = work.request, work.request.profile
    check_judge(profile.evaluation.judge)
    context = profile.runtime.max_context or profile.context_length
    evaluator = Evaluator(
        profile=profile,
        reference=work.inputs["checkpoint"].path,
        reference_digest=work.inputs["checkpoint"].digest,
        questions=questions(request),
        texts=texts(request),
        needles=needles(request),
        context=context,
        store=work.store,
        fresh=request.flag("force"),
    )
    versions = {}
    for uri in work.inputs["version"].location.split():
        console.say(f"  {uri}")
        version = registry.find_version(uri, profile.registered_model)
        result = evaluator.evaluate(version, work.out / Path(uri).name)
        versions[uri] = result.record()
        for name, figure in result.figures.items():
            mlflow.log_figure(figure, f"figures/version-{version.version}/{name}.png")
        console.say(f"  gate: {result.verdict.decision}: {result.verdict.why}")
        if not work.metrics:
            work.metrics.update(result.measurement.metrics)
    work.record(
        {
            "run_id": work.run.run_id,
            "versions": versions,
            "hardware": evaluator.hardware,
            "texts_sha256": evaluator.sets.digests()["texts_sha256"],
        }
    )
    work.run.log_evaluation(work.out, questions(request), texts(request))


def after(request: Request, entry: Entry) -> None:
    """Mark the versions with the verdict."""
    record = read_record(entry)
    for uri, result in record["versions"].items():
        version = registry.find_version(uri, request.profile.registered_model)
        verdict = result["verdict"]
        checks = [check for check in verdict["checks"] if not check["passed"]]
        checks += [check for check in verdict["comparisons"] if check["state"] == "worse"]
        figures = {key: result["metrics"][key] for key in HEADLINE if key in result["metrics"]}
        registry.set_tags(
            version,
            {
                "gate": "passed" if verdict["passed"] else "failed",
                "gate_decision": verdict["decision"],
                "gate_reasons": "\n".join(check["reason"] for check in checks) or verdict["why"],
                registry.GATE_AGAINST: registry.number_of(verdict["against"]),
                "evaluation_run": record["run_id"],
                TEXTS_TAG: record["texts_sha256"],
                **{key: _plain(value) for key, value in figures.items()},
            },
        )
        card = model_card(
            request.profile, registry.describe(version).tags, figures, record["hardware"]
        )
        registry.set_description(version, card)


def _plain(value: float) -> str:
    """A number that programs can read, too."""
    return str(int(value)) if value.is_integer() else f"{value:.4g}"


def headline_metrics(record: dict[str, Any]) -> dict[str, float]:
    """The figures of the first version, for the console."""
    metrics = next(iter(record["versions"].values()))["metrics"]
    return {key: metrics[key] for key in HEADLINE if key in metrics}


STEP = Step(
    name="evaluate",
    summary="measuring the version against full precision",
    parameters=("version", "checkpoint", "flavor", "registered_model", "size", "questions"),
    inputs=inputs,
    settings=settings,
    work=work,
    libraries=("onnxruntime",),  # what onnxruntime-genai computes with
    after=after,
)
