"""Move the alias `champion` to a version that passed the gate, or back to the one before.

    mlflow run . -e promote -P profile=smollm2-135m
    python -m steps.promote --profile smollm2-135m --action rollback

Ends with code 3, the alias untouched, when the gate said no. `force=true` moves it all the same
and is recorded as forced. A version that is champion already stays so, and so does a champion
that the version is not shown to match.
"""

from __future__ import annotations

from typing import Any

from phi3_mlflow.artifacts.cache import StepCache
from phi3_mlflow.config.parameters import Request
from phi3_mlflow.core import console
from phi3_mlflow.pipeline.step import Input, Step, Work
from phi3_mlflow.tracking import registry
from phi3_mlflow.tracking.runs import tracking_identity


def inputs(request: Request, store: StepCache) -> dict[str, Input]:
    if request.value("action") == "rollback":
        return {}
    version = registry.find_version(request.value("version"), request.profile.registered_model)
    return {"version": Input(version.uri, version.uri)}


def settings(request: Request) -> dict[str, Any]:
    return {
        "action": request.value("action"),
        "force": request.flag("force"),
        "registered_model": request.profile.registered_model,
        "tracking": tracking_identity(),
    }


def work(work: Work) -> None:
    request = work.request
    if request.value("action") == "rollback":
        done = registry.rollback(request.profile.registered_model)
    else:
        version = registry.find_version(
            work.inputs["version"].location, request.profile.registered_model
        )
        done = registry.promote(version, force=request.flag("force"))
    state = "is now" if done.moved else "stays"
    console.say(f"  {registry.CHAMPION} {state} {done.champion.uri}: {done.reason}")
    work.record(done.record())


STEP = Step(
    name="promote",
    summary="moving the alias champion, if the gate allows it",
    parameters=("version", "registered_model", "action"),
    inputs=inputs,
    settings=settings,
    work=work,
    always=True,
    light=True,
)
