"""Take a model all the way: fetch, train, quantize, export, log, register, evaluate, promote.

    mlflow run . --env-manager local
    mlflow run . --env-manager local -P profile=phi-3-mini-4k
    python -m steps.main --profile smollm2-135m --algorithm rtn

Each step is a child run of one parent run. What an earlier run has made already is taken from the
cache; when nothing has changed, nothing is done. Before the first step that has work it is said
what memory, disk and roughly what time the run needs, and a machine that is too small is refused.
Ends with code 3 when the gate refuses the version: the alias `champion` then stays where it was.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from phi3_mlflow.artifacts.cache import StepCache
from phi3_mlflow.config.parameters import Request
from phi3_mlflow.core import console
from phi3_mlflow.core.console import summary_line
from phi3_mlflow.core.errors import GateRefused
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
from phi3_mlflow.stages.ending import say_done, say_refused
from phi3_mlflow.stages.evaluate import headline_metrics
from phi3_mlflow.stages.foresight import foreseen_for, refuse_what_does_not_fit
from phi3_mlflow.tracking.connection import connect
from phi3_mlflow.tracking.runs import StepRun, step_run

if TYPE_CHECKING:
    from collections.abc import Mapping

    from phi3_mlflow.config.profile import Profile
    from phi3_mlflow.pipeline.step import Outcome, Step
    from phi3_mlflow.stages.records import EvaluationRecord

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
            # Where keys lie, and with what a machine signs, is nobody else's business.
            aside = {"trust"} if request.profile.search.on else {"search", "trust"}
            run.log_settings(request.profile.model_dump(mode="json", exclude=aside), {})
            with Pipeline(request, run.run_id, partial(say_what_is_needed, request)) as pipeline:
                try:
                    done = follow(sequence(fetch.followed(request)), pipeline)
                except GateRefused:
                    say_refused(request, show_models(run, pipeline))
                    raise
                evaluated, promoted = show_models(run, pipeline), done.record(PROMOTE)
                verdict = evaluated.record.challenger.verdict
                busy = any(not outcome.hit for outcome in pipeline.outcomes[:-1])
                say_done(request, evaluated, promoted, worked=busy)
        worked = sum(not outcome.hit for outcome in pipeline.outcomes)
        print(
            summary_line(
                step="main", status="done", profile=request.profile.name, steps_done=worked,
                run_id=run.run_id, **run.figures(),
                gate=f"{verdict.gate}, {verdict.decision}", champion=promoted.champion,
            ),
            flush=True,
        )  # fmt: skip


def show_models(run: StepRun, pipeline: Pipeline) -> Outcome[EvaluationRecord]:
    """Show what was logged, registered and measured with the run of the whole.

    Returns:
        How the evaluation ended.
    """
    models = pipeline.outcome(LOG).record.models
    versions = pipeline.outcome(REGISTER).record.versions
    run.link_models(
        [model.model_id for model in models], [one.version_name.uri for one in versions]
    )
    evaluated = pipeline.outcome(EVALUATE)
    run.log_headline(headline_metrics(evaluated.record.challenger))
    return evaluated


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


COMMAND = Main()
