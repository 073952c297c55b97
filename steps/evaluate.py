"""Measure versions against the full-precision checkpoint, and say whether they pass the gate.

    mlflow run . -e evaluate -P profile=smollm2-135m
    python -m steps.evaluate --profile smollm2-135m --version 3 --size full

Measured: perplexity, KL divergence and top-1 agreement on held-out text, the share of questions
answered right, tokens per second and peak memory. The profile's thresholds decide; the version
gets the tag `gate` and the reasons, the run the figures, every answer and the verdict.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from phi3_mlflow import console, registry
from phi3_mlflow.card import model_card
from phi3_mlflow.cli import run_script
from phi3_mlflow.evaluation import datasets
from phi3_mlflow.params import AUTO, Request
from phi3_mlflow.step import (
    Input,
    Step,
    Work,
    directory_input,
    entry_input,
    preceding_output,
    read_record,
)
from phi3_mlflow.store import Entry, Store
from phi3_mlflow.tracking import tracking_identity


def inputs(request: Request, store: Store) -> dict[str, Input]:
    if request.is_auto("checkpoint"):
        reference = entry_input(preceding_output(request, store, "checkpoint", "fetch"))
    else:
        text = request.value("checkpoint")
        reference = directory_input("checkpoint", text, "a Hugging Face checkpoint")
    versions = _versions(request, store)
    uris = [version.uri for version in versions]
    contents = [registry.describe(version).tags.get("artifact_sha256", "") for version in versions]
    digest = " ".join(f"{uri}#{content}" for uri, content in zip(uris, contents, strict=True))
    return {"version": Input(" ".join(uris), digest), "checkpoint": reference}


def _versions(request: Request, store: Store) -> list[registry.VersionName]:
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


def questions(request: Request) -> list[datasets.Question]:
    chosen = request.profile.evaluation
    return datasets.load_questions(_source(chosen.questions), quick=chosen.size == "quick")


def texts(request: Request) -> list[datasets.HeldoutText]:
    chosen = request.profile.evaluation
    return datasets.load_heldout(_source(chosen.texts), quick=chosen.size == "quick")


def settings(request: Request) -> dict[str, Any]:
    profile = request.profile
    return {
        "window": profile.evaluation.window,
        "questions_sha256": datasets.digest(questions(request)),
        "texts_sha256": datasets.digest(texts(request)),
        "thresholds": profile.gate.model_dump(mode="json", exclude_none=True)["thresholds"],
        "tracking": tracking_identity(),
    }


def work(work: Work) -> None:
    from phi3_mlflow.evaluation.measure import measure

    request = work.request
    uris = work.inputs["version"].location.split()
    results = {}
    for uri in uris:
        console.say(f"  {uri}")
        results[uri] = measure(
            uri,
            reference=work.inputs["checkpoint"].path,
            texts=texts(request),
            questions=questions(request),
            window=request.profile.evaluation.window,
            thresholds=request.profile.gate.thresholds,
            out=work.out / Path(uri).name,
        )
        for reason in results[uri].verdict.reasons:
            console.say(f"  gate: {reason}")
    work.metrics.update(results[uris[0]].metrics)
    work.record(
        {
            "run_id": work.run.run_id,
            "versions": {uri: result.to_dict() for uri, result in results.items()},
        }
    )
    work.run.log_evaluation(work.out, questions(request), texts(request))


def after(request: Request, entry: Entry) -> None:
    """Mark the versions with the verdict."""
    record = read_record(entry)
    for uri, result in record["versions"].items():
        version = registry.find_version(uri, request.profile.registered_model)
        verdict = result["verdict"]
        reasons = [check["reason"] for check in verdict["checks"] if not check["passed"]]
        headline = {key: f"{result['metrics'][key]:.4g}" for key in HEADLINE}
        registry.set_tags(
            version,
            {
                "gate": "passed" if verdict["passed"] else "failed",
                "gate_reasons": "\n".join(reasons),
                "evaluation_run": record["run_id"],
                **headline,
            },
        )
        figures = {key: result["metrics"][key] for key in HEADLINE}
        registry.set_description(
            version, model_card(request.profile, registry.describe(version).tags, figures)
        )


HEADLINE = (
    "accuracy",
    "perplexity",
    "perplexity_reference",
    "kl_mean",
    "top1_agreement",
    "tokens_per_second",
    "peak_memory_bytes",
    "size_bytes",
)


def headline_metrics(record: dict[str, Any]) -> dict[str, float]:
    """The figures of the first version, for the console."""
    result = next(iter(record["versions"].values()))
    return {key: result["metrics"][key] for key in HEADLINE}


STEP = Step(
    name="evaluate",
    summary="measuring the version against full precision",
    parameters=("version", "checkpoint", "flavor", "registered_model", "size", "questions"),
    inputs=inputs,
    settings=settings,
    work=work,
    code=("steps/evaluate.py", "phi3_mlflow/evaluation"),
    libraries=("onnxruntime-genai", "transformers", "torch", "mlflow"),
    after=after,
)

if __name__ == "__main__":
    run_script(STEP, __doc__)
