"""Take a model all the way: fetch, train, quantize, export, log, register, evaluate, promote.

    mlflow run .
    mlflow run . -P profile=phi-3-mini-4k
    python -m steps.main --profile smollm2-135m --algorithm rtn

Each step is a child run of one parent run. What an earlier run has made already is taken from the
cache; when nothing has changed, nothing is done. Before the first step that has work it is said
what memory, disk and roughly what time the run needs, and a machine that is too small is refused.
Ends with code 3 when the gate refuses the version: the alias `champion` then stays where it was.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_mlflow.artifacts.cache import StepCache
from phi3_mlflow.config.loading import find_profile, profile_names
from phi3_mlflow.config.parameters import Request
from phi3_mlflow.core import console
from phi3_mlflow.core.console import summary_line
from phi3_mlflow.core.git import origin
from phi3_mlflow.core.shipped import checkout
from phi3_mlflow.evaluation.metrics import headline
from phi3_mlflow.pipeline.command import Command
from phi3_mlflow.pipeline.dry_run import foretell, text
from phi3_mlflow.pipeline.runner import Pipeline
from phi3_mlflow.pipeline.sequence import Done, Part, follow, needed
from phi3_mlflow.stages import (
    evaluate,
    export,
    fetch,
    log,
    promote,
    quantize,
    register,
    search,
    train,
)
from phi3_mlflow.stages.evaluate import headline_metrics
from phi3_mlflow.stages.foresight import foreseen_for, refuse_what_does_not_fit
from phi3_mlflow.tracking import registry
from phi3_mlflow.tracking.connection import connect, tracking_identity
from phi3_mlflow.tracking.runs import step_run

if TYPE_CHECKING:
    from collections.abc import Mapping

    from phi3_mlflow.config.profile import Profile
    from phi3_mlflow.pipeline.step import Step

FETCH, TRAIN, SEARCH = fetch.STEP, train.STEP, search.STEP
QUANTIZE, EXPORT = quantize.STEP, export.STEP
LOG, REGISTER, EVALUATE, PROMOTE = log.STEP, register.STEP, evaluate.STEP, promote.STEP


def searches(profile: Profile) -> bool:
    """Whether the quantization is to be chosen among several."""
    return profile.quantizes and profile.search.on


def with_the_best(profile: Profile, done: Done) -> Profile:
    """The profile with the settings that the search has chosen."""
    return search.as_profile(profile, done.record(SEARCH).best)


def checkpoint(done: Done) -> Mapping[str, object]:
    """The full-precision checkpoint: the fine-tuned one, where the profile has rows to train on."""
    return {"checkpoint": done.folder(TRAIN, FETCH)}


def logged_folders(done: Done) -> Mapping[str, object]:
    """What `log` takes: the checkpoint, and the ONNX directory where there is one."""
    onnx = {"onnx": done.folder(EXPORT)} if EXPORT in done else {}
    return {**checkpoint(done), **onnx}


SEQUENCE = (
    Part(FETCH, lambda done: {}),
    Part(TRAIN, lambda done: {"checkpoint": done.folder(FETCH)}, lambda p: p.train is not None),
    Part(SEARCH, checkpoint, searches, with_the_best),
    Part(QUANTIZE, checkpoint, lambda p: p.quantizes),
    Part(
        EXPORT,
        lambda done: {"checkpoint": done.folder(QUANTIZE, TRAIN, FETCH)},
        lambda p: p.makes_onnx,
    ),
    Part(LOG, logged_folders),
    Part(REGISTER, lambda done: {"model_uri": done.record(LOG)}),
    Part(
        EVALUATE,
        lambda done: {
            "version": done.record(REGISTER),
            "base": done.folder(FETCH),
            **checkpoint(done),
        },
    ),
    Part(PROMOTE, lambda done: {"version": done.record(REGISTER).challenger}),
)
"""The steps in their order, each with the condition on which a profile needs it."""


class Main(Command):
    """From the source to the champion."""

    name = "main"
    parameters = (
        "profile", "source", "data", "flavor", "contract", "precision", "algorithm", "block_size",
        "registered_model", "size", "questions", "force", "dry_run", "quiet",
    )  # fmt: skip
    choices = {"force": ("true", "false", "all", *(part.step.name for part in SEQUENCE))}  # noqa: RUF012

    def run(self, request: Request) -> None:
        if request.flag("force"):
            request = Request(request.profile, {**request.values, "force": "all"})
        if request.flag("dry_run"):
            connect()
            moved = fetch.followed(request)
            forecasts = foretell(sequence(moved), request)
            todo = [forecast.step for forecast in forecasts if forecast.reason]
            foreseen = foreseen_for(request, StepCache(), todo)
            print(text(forecasts, fetch.where(request, moved), foreseen), flush=True)
            return
        with step_run("main", request.profile.name) as run:
            aside = set() if request.profile.search.on else {"search"}
            run.log_settings(request.profile.model_dump(mode="json", exclude=aside), {})
            with Pipeline(request, run.run_id, partial(say_what_is_needed, request)) as pipeline:
                done = follow(sequence(fetch.followed(request)), pipeline)
                run.log_headline(headline_metrics(done.record(EVALUATE).challenger))
                report(request, pipeline, done)
        verdict = done.record(EVALUATE).challenger.verdict
        worked = sum(not outcome.hit for outcome in pipeline.outcomes)
        print(
            summary_line(
                step="main", status="done", profile=request.profile.name, steps_done=worked,
                run_id=run.run_id, **run.figures(),
                gate=f"{verdict.gate}, {verdict.decision}", champion=done.record(PROMOTE).champion,
            ),
            flush=True,
        )  # fmt: skip


def sequence(moved: Mapping[str, str]) -> tuple[Part, ...]:
    """The steps, the first of them told where the branch that the profile follows is now."""
    return (Part(FETCH, lambda done: moved), *SEQUENCE[1:])


def say_what_is_needed(request: Request, first: Step[Any, Any]) -> None:
    """Say what the steps from the first on need, where that is known, or refuse the run.

    Raises:
        EnvironmentProblem: the machine is too small.
    """
    names = [step.name for step in needed(SEQUENCE, request.profile)]
    cache = StepCache()
    foreseen = foreseen_for(request, cache, names[names.index(first.name) :])
    if foreseen:
        lines = [f"  {step:<9} {needs}" for step, needs in foreseen.items()]
        console.say("\n".join(["This run needs, beside what is in the cache:", *lines]))
        refuse_what_does_not_fit(request.profile, foreseen, cache.root)


def report(request: Request, pipeline: Pipeline, done: Done) -> None:
    """Tell the person who started it what there is now, and what to do with it."""
    name = request.profile.registered_model
    aliases = {alias: registry.alias_of(name, alias) for alias in ("challenger", "champion")}
    worked = [outcome for outcome in pipeline.outcomes[:-1] if not outcome.hit]
    lines = ["", "-" * 78]
    if not worked and not done.record(PROMOTE).moved:
        lines.append("Nothing to do: everything is as an earlier run left it.")
    lines.append(f"Registered model  {name}")
    lines += [f"  {alias:<12} version {version}" for alias, version in aliases.items() if version]
    lines.append("Measured")
    evaluated = done.record(EVALUATE).challenger
    lines += [f"  {label:<34} {shown}" for label, shown in headline(headline_metrics(evaluated))]
    lines += ["Asked", f"  {evaluated.sample.question}", f"  > {evaluated.sample.answer}"]
    lines += ["Next", *(f"  {line}" for line in next_commands(request))]
    console.say("\n".join([*lines, "-" * 78]))


def next_commands(request: Request) -> list[str]:
    """Commands to copy, with the programs of the environment this runs in."""
    mlflow = Path(sys.executable).with_name("mlflow")
    program = str(mlflow) if mlflow.exists() else "mlflow"
    if mlflow.is_relative_to(Path.cwd()):
        program = str(mlflow.relative_to(Path.cwd()))
    store = shlex.quote(tracking_identity())
    name, profile = request.profile.registered_model, shlex.quote(_from_anywhere(request))
    project = _project()
    serve = (
        f"phi3-mlflow serve --profile {profile}"
        if project is None
        else f"{program} run {project} -e serve --env-manager local -P profile={profile}"
    )
    return [
        "look at it:       " + f"{program} ui --backend-store-uri {store}",
        "serve it:         " + f"MLFLOW_TRACKING_URI={store} {serve}",
        "  or with MLflow: " + f"MLFLOW_TRACKING_URI={store} {program} models serve "
        f"-m models:/{name}@champion --env-manager local -p 5001",
        "run Phi-3-mini:   make run PROFILE=phi-3-mini-4k",
    ]


def _from_anywhere(request: Request) -> str:
    """The profile as it is named from any working folder."""
    given = request.value("profile")
    return given if given in profile_names() else str(find_profile(given).absolute())


def _project() -> str | None:
    """How `mlflow run` is told where the project is; None for an installed package."""
    root = checkout()
    if root is None:
        return None
    if root == Path.cwd():
        return "."
    # `mlflow run GIT_URL` works in a clone that is gone afterwards.
    passing = root.is_relative_to(Path(tempfile.gettempdir()).resolve())
    return shlex.quote((origin().url if passing else None) or str(root))


COMMAND = Main()
