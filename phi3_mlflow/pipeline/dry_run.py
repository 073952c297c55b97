"""What `main` would do: which steps, why, and what they cost the last time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from phi3_mlflow.artifacts.cache import Entry, StepCache
from phi3_mlflow.pipeline.runner import for_step
from phi3_mlflow.pipeline.sequence import Follower, Part, follow, needed
from phi3_mlflow.pipeline.step import Outcome, PlannedStep, Rec, Step, find_hit, plan

if TYPE_CHECKING:
    from phi3_mlflow.config.parameters import Request


UNLESS_EQUAL = "unless the step before leaves the same bytes as the last time"
"""Why a step would run whose input is made anew."""


class Unknown(Exception):
    """From here on nothing can be foretold: it depends on what a step would make."""


@dataclass(frozen=True)
class Forecast:
    """One step's part in a run that has not begun.

    Attributes:
        step: its name.
        reason: why it would run; None when its output is in the cache.
        last: the output it last left for the profile, for what it cost.
        foreseen: what it would cost, where that can be known.
    """

    step: str
    reason: str | None
    last: Entry | None
    foreseen: str | None = None

    def line(self) -> str:
        """What a person reads of it."""
        if self.reason is None:
            return f"  {self.step:<9} nothing to do, in the cache"
        return f"  {self.step:<9} would run: {self.reason}{self._foreseen}{cost(self.last)}"

    @property
    def _foreseen(self) -> str:
        return f"; needs {self.foreseen}" if self.foreseen else ""


class DryRun(Follower):
    """Takes the place of a pipeline, looks at each step and does none of them."""

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self._cache = StepCache()
        self.forecasts: list[Forecast] = []
        self._perhaps = False

    def run(self, step: Step[Any, Rec], **results: object) -> Outcome[Rec]:
        """Foretell a step.

        Raises:
            Unknown: it would run, so what the steps after it are given is not known.
        """
        request = for_step(self._request, step, results)
        planned = plan(step, request, self._cache)
        entry = find_hit(planned, self._cache)
        if entry is None:
            last = self._last(step)
            why = reason(planned, last, request.flag("force"))
            foreseen = step.foresee(request, planned.inputs)
            self.forecasts.append(Forecast(step.name, why, last, foreseen))
            self._perhaps = last is not None and may_come_out_the_same(planned, last)
            raise Unknown
        self.forecasts.append(Forecast(step.name, None, entry))
        return Outcome(step, entry, True, str(entry.origin.get("run_id", "")))

    def rest(self, steps: Sequence[Step[Any, Any]]) -> None:
        """Add the steps that come after the first that would run."""
        known = {forecast.step for forecast in self.forecasts}
        for step in steps:
            if step.name not in known:
                why = UNLESS_EQUAL if self._perhaps else "its input would be new"
                self.forecasts.append(Forecast(step.name, why, self._last(step)))

    def _last(self, step: Step[Any, Any]) -> Entry | None:
        return self._cache.latest(self._request.profile.name, step.name, step.slot)


def foretell(parts: Sequence[Part], request: Request) -> list[Forecast]:
    """What following a sequence would do, step by step."""
    dry = DryRun(request)
    try:
        follow(parts, dry)
    except Unknown:
        dry.rest(needed(parts, request.profile))
    return dry.forecasts


def reason(planned: PlannedStep[Any], last: Entry | None, forced: bool) -> str:
    """Why a planned step has to run, given what it last left for this profile."""
    if not planned.step.cached:
        return "it looks for itself whether there is something to do"
    if forced:
        return "forced"
    if last is None:
        return "it has not been done for this profile yet"
    changed = changed_parts(last.origin.get("parts", {}), planned.parts)
    if not changed:
        return "what it left is no longer whole, or no longer in MLflow"
    return "changed: " + ", ".join(changed)


def may_come_out_the_same(planned: PlannedStep[Any], last: Entry) -> bool:
    """Whether a step that runs may leave what it left the last time, byte for byte.

    So it is when the step is forced, or when code or libraries changed and nothing else: the steps
    after it then find their output in the cache.
    """
    old, new = last.origin.get("parts", {}), planned.parts
    return all(old.get(name) == new.get(name) for name in ("settings", "inputs"))


def changed_parts(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The names of the key parts that differ, dotted, with their values where these are short."""
    names: list[str] = []
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            names += changed_parts(before, after, f"{prefix}{name}.")
        elif before != after or type(before) is not type(after):
            names.append(f"{prefix}{name}{_how(prefix, before, after)}")
    return names


def _how(prefix: str, before: object, after: object) -> str:
    """How a part differs, where that can be told in a few words."""
    if prefix.startswith(("settings", "libraries")) and len(f"{before}{after}") < 60:
        return f" ({before} -> {after})"
    if prefix.startswith("inputs.") and None in (before, after):  # one file of several
        return " (new)" if before is None else " (gone)"
    return ""


def cost(last: Entry | None) -> str:
    """What the step took the last time, or nothing when that is not known."""
    if last is None or not (known := last.origin.get("cost")):
        return ""
    downloaded = last.origin.get("metrics", {}).get("bytes_downloaded", 0)
    return (
        f"; last time {known['wall_time_s']:.0f} s, {known['peak_rss_bytes'] / 1e6:.0f} MB of "
        f"memory, {last.manifest.total_bytes / 1e6:.0f} MB of disk"
        + (f", {downloaded / 1e6:.0f} MB of download" if downloaded else "")
    )


def text(
    forecasts: Sequence[Forecast],
    before: str | None = None,
    foreseen: Mapping[str, object] | None = None,
) -> str:
    """All steps, a line each, and a last line with the sum.

    Args:
        forecasts: of the steps.
        before: a line to put above them.
        foreseen: by the step's name what it needs, for those that could not say it themselves.
    """
    known = foreseen or {}
    forecasts = [
        replace(f, foreseen=f.foreseen or (str(known[f.step]) if f.step in known else None))
        for f in forecasts
    ]
    todo = [forecast.step for forecast in forecasts if forecast.reason]
    perhaps = any(forecast.reason == UNLESS_EQUAL for forecast in forecasts)
    last = f"{'At most ' * perhaps}{len(todo)} of {len(forecasts)} steps would run."
    head = ["Plan (nothing is done):", *([f"  {before}"] if before else [])]
    return "\n".join([*head, *(f.line() for f in forecasts), last])
