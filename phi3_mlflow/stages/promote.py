"""Move the alias `champion` to a version that passed the gate, or back to the one before.

    mlflow run . --env-manager local -e promote -P profile=smollm2-135m
    python -m steps.promote --profile smollm2-135m --action rollback

Ends with code 3, the alias untouched, when the gate said no. `overrule=true` moves it all the same
and is recorded as forced. A version that is champion already stays so, and so does a champion
that the version is not shown to match. Where the profile says `trust.require: signature`, a version
whose signature, provenance or signed verdict is not right is refused, overruled or not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from phi3_mlflow.artifacts.inputs import Input
from phi3_mlflow.core import console
from phi3_mlflow.pipeline.step import Settings, Step, Work, step_parameters
from phi3_mlflow.stages.records import PromotionRecord
from phi3_mlflow.tracking import promotion, registry
from phi3_mlflow.tracking.connection import tracking_identity
from phi3_mlflow.tracking.registry import VersionName
from phi3_mlflow.trust.policy import refuse_untrusted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from phi3_mlflow.artifacts.cache import Entry, StepCache
    from phi3_mlflow.config.parameters import Request


@dataclass(frozen=True)
class PromoteInputs:
    """A version; none for a rollback."""

    version: Input[VersionName] | None


class Promote(Step[PromoteInputs, PromotionRecord]):
    """Verdict to alias."""

    name = "promote"
    doing = "moving the alias champion, if the gate allows it"
    parameters = step_parameters("version", "registered_model", "action", "overrule")
    record_type = PromotionRecord
    in_mlflow = True
    in_main_process = True
    cached = False

    def inputs(self, request: Request, cache: StepCache) -> PromoteInputs:
        if request.value("action") == "rollback":
            return PromoteInputs(None)
        version = request.handed("version", VersionName) or registry.find_version(
            request.value("version"), request.profile.registered_model
        )
        return PromoteInputs(Input(version, version.uri, version.uri))

    def settings(self, request: Request) -> Settings:
        return {
            "action": request.value("action"),
            "overrule": overrules(request),
            "registered_model": request.profile.registered_model,
            "tracking": tracking_identity(),
        }

    def run_name(self, request: Request, inputs: PromoteInputs) -> str:
        if inputs.version is None:
            return f"rollback {request.profile.registered_model}"
        return f"{self.name} v{inputs.version.value.version}"

    def told(self, entry: Entry) -> Mapping[str, str]:
        record = self.record_of(entry)
        return {"champion": record.champion, "moved": str(record.moved).lower()}

    def work(self, work: Work[PromoteInputs]) -> None:
        request, version = work.request, work.inputs.version
        if request.flag("force") and not request.flag("overrule"):
            console.say(
                "  force=true of promote is called overrule=true now; it still moves the alias in "
                "this version of the project, and will mean `do it again` in the next"
            )
        trust, overrule = request.profile.trust, overrules(request)
        if version is None:
            name = request.profile.registered_model
            done = promotion.rollback(name, lambda target: refuse_untrusted(target.uri, trust))
        else:
            done = promotion.promote(
                version.value,
                overrule=overrule,
                allowed=lambda one: refuse_untrusted(one.uri, trust, verdict=not overrule),
            )
        state = "is now" if done.moved else "stays"
        console.say(f"  {registry.CHAMPION} {state} {done.champion.uri}: {done.reason}")
        PromotionRecord(
            champion=done.champion.uri, before=done.before, moved=done.moved, reason=done.reason
        ).write(work.out)


def overrules(request: Request) -> bool:
    """Whether the gate is to be overruled; `force` said so up to version 0.1."""
    return request.flag("overrule") or request.flag("force")


STEP = Promote()
