"""Take a model all the way: fetch, quantize, export, log, register, evaluate, promote.

    mlflow run .
    mlflow run . -P profile=phi-3-mini-4k
    python -m steps.main --profile smollm2-135m --algorithm rtn

Each step is a child run of one parent run. What an earlier run has made already is taken from the
cache; when nothing has changed, nothing is done. Ends with code 3 when the gate refuses the
version: the alias `champion` then stays where it was.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from phi3_mlflow.config.parameters import Request
from phi3_mlflow.core import console
from phi3_mlflow.evaluation.figures import readable
from phi3_mlflow.pipeline.dry_run import DryRun, Unknown, text
from phi3_mlflow.pipeline.runner import Pipeline
from phi3_mlflow.pipeline.step import Outcome
from phi3_mlflow.stages import evaluate, export, fetch, log, promote, quantize, register, search
from phi3_mlflow.tracking import registry
from phi3_mlflow.tracking.runs import connect, step_run, summary_line, tracking_identity

STEPS = (fetch, search, quantize, export, log, register, evaluate, promote)
PARAMETERS = (
    "profile",
    "source",
    "flavor",
    "contract",
    "precision",
    "algorithm",
    "block_size",
    "registered_model",
    "size",
    "questions",
    "force",
    "dry_run",
    "quiet",
)
CHOICES = {"force": ("true", "false", "all", *(module.STEP.name for module in STEPS))}


def main(request: Request) -> None:
    console.set_quiet(request.flag("quiet"))
    if request.flag("force"):
        request = Request(request.profile, {**request.values, "force": "all"})
    if request.flag("dry_run"):
        print(foretell(request), flush=True)
        return
    with step_run("main", request, None) as run:
        aside = set() if request.profile.search.on else {"search"}
        run.log_settings(request.profile.model_dump(mode="json", exclude=aside), {})
        with Pipeline(request, run.run_id) as pipeline:
            result = sequence(pipeline, request, fetch.followed(request))
            run.log_headline(evaluate.headline_metrics(result.record))
            report(request, pipeline, result)
    done = sum(not outcome.hit for outcome in pipeline.outcomes)
    print(
        summary_line(
            step="main", status="done", profile=request.profile.name, steps_done=done,
            run_id=run.run_id, **run.figures(),
        ),
        flush=True,
    )  # fmt: skip


def foretell(request: Request) -> str:
    """What this run would do, without doing it."""
    connect()
    dry = DryRun(request)
    profile = request.profile
    followed = fetch.followed(request)
    skipped = {
        "search": not (profile.quantizes and profile.search.on),
        "quantize": not profile.quantizes,
        "export": not profile.makes_onnx,
    }
    try:
        sequence(dry, request, followed)
    except Unknown:
        dry.rest([module.STEP for module in STEPS if not skipped.get(module.STEP.name)])
    return text(dry.forecasts, fetch.where(request, followed))


def sequence(pipeline: Pipeline | DryRun, request: Request, followed: Mapping[str, str]) -> Outcome:
    """The steps that the profile needs, each given what those before it made."""
    profile = request.profile
    checkpoint = path = str(pipeline.run(fetch.STEP, **followed).entry.path)
    if profile.quantizes:
        if profile.search.on:
            found = pipeline.run(search.STEP, checkpoint=checkpoint)
            pipeline.go_on_with(search.chosen(request, found.record))
        path = str(pipeline.run(quantize.STEP, checkpoint=checkpoint).entry.path)
    if profile.makes_onnx:
        onnx = str(pipeline.run(export.STEP, checkpoint=path).entry.path)
        logged = pipeline.run(log.STEP, checkpoint=checkpoint, onnx=onnx)
    else:
        logged = pipeline.run(log.STEP, checkpoint=checkpoint)
    uris = ",".join(model["model_uri"] for model in logged.record["models"])
    registered = pipeline.run(register.STEP, model_uri=uris)
    challenger = register.challenger(registered.entry)
    others = [f"models:/{v['name']}/{v['version']}" for v in registered.record["versions"]]
    versions = sorted(others, key=lambda uri: uri != challenger.uri)
    evaluated = pipeline.run(evaluate.STEP, version=",".join(versions), checkpoint=checkpoint)
    pipeline.run(promote.STEP, version=challenger.uri)
    return evaluated


def report(request: Request, pipeline: Pipeline, evaluated: Outcome) -> None:
    """Tell the person who started it what there is now, and what to do with it."""
    name = request.profile.registered_model
    aliases = {alias: registry.alias_of(name, alias) for alias in ("challenger", "champion")}
    worked = [o.step for o in pipeline.outcomes[:-1] if not o.hit]
    promotion = pipeline.outcomes[-1].record
    lines = ["", "-" * 78]
    if not worked and not promotion["moved"]:
        lines.append("Nothing to do: everything is as an earlier run left it.")
    lines.append(f"Registered model  {name}")
    lines += [f"  {alias:<12} version {version}" for alias, version in aliases.items() if version]
    lines.append("Measured")
    metrics = evaluate.headline_metrics(evaluated.record)
    lines += [f"  {label:<34} {text}" for label, text in readable(metrics)]
    sample = next(iter(evaluated.record["versions"].values()))["sample"]
    lines += ["Asked", f"  {sample['question']}", f"  > {sample['answer']}"]
    lines += ["Next", *(f"  {line}" for line in next_commands(name))]
    console.say("\n".join([*lines, "-" * 78]))


def next_commands(name: str) -> list[str]:
    """Commands to copy, with the programs of the environment this runs in."""
    mlflow = Path(sys.executable).with_name("mlflow")
    program = str(mlflow) if mlflow.exists() else "mlflow"
    if mlflow.is_relative_to(Path.cwd()):
        program = str(mlflow.relative_to(Path.cwd()))
    store = shlex.quote(tracking_identity())
    return [
        "look at it:       " + f"{program} ui --backend-store-uri {store}",
        "serve it:         " + f"MLFLOW_TRACKING_URI={store} {program} models serve "
        f"-m models:/{name}@champion --env-manager local -p 5001",
        "run Phi-3-mini:   make run PROFILE=phi-3-mini-4k",
    ]
