"""What a step is, and how one is carried out: key, hit or work, record.

A step's script declares a `Step`; `carry_out` does the rest, alike for a step that is run alone and
for one that `main` runs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_mlflow.artifacts.cache import Entry, StepCache, key_of
from phi3_mlflow.artifacts.code_keys import Closure, closure, version_of
from phi3_mlflow.artifacts.manifests import MANIFEST_NAME, Manifest
from phi3_mlflow.config.parameters import SHARED, Request
from phi3_mlflow.core import console
from phi3_mlflow.core.errors import UserError

if TYPE_CHECKING:
    from phi3_mlflow.tracking.runs import StepRun

ROOT = Path(__file__).resolve().parents[2]
RECORD_NAME = "record.json"
IN_MLFLOW = ("log", "register", "evaluate", "promote", "reproduce")
"""The steps whose output lives in a tracking store, so that another store knows nothing of it."""


@dataclass(frozen=True)
class Input:
    """What a step takes: where it is, and the identity of its content."""

    location: str
    digest: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    entry: Entry | None = None

    @property
    def path(self) -> Path:
        return Path(self.location)


@dataclass
class Work:
    """A step's work while it is being done.

    Attributes:
        request: the profile and the parameters.
        inputs: what the step takes, by parameter name.
        out: the empty directory to fill with the output.
        run: the MLflow run of the step.
        store: the cache, for downloads.
        key: the output's cache key, the same for the same work.
        settings: the typed values that decide the output, as they went into the key.
        metrics: figures to log and keep with the output.
    """

    request: Request
    inputs: Mapping[str, Input]
    out: Path
    run: StepRun
    store: StepCache
    key: str
    settings: Mapping[str, Any]
    metrics: dict[str, float] = field(default_factory=dict)

    def record(self, content: Mapping[str, Any]) -> None:
        """Leave an output that lives in MLflow: its names, as JSON."""
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        (self.out / RECORD_NAME).write_text(text, "utf-8")


@dataclass(frozen=True)
class Step:
    """One step of the pipeline.

    Attributes:
        name: as in MLproject.
        summary: one line for `--help`.
        parameters: the names it takes beside the shared ones.
        inputs: finds what it takes, or says which command makes it.
        settings: the typed values that decide its output.
        work: does it.
        module: where it is written, when that is not the script of its name.
        copies: modules that go into its output as they are, without being imported.
        libraries: distributions that decide the output behind those that are imported.
        still_there: for output that lives in MLflow, says what of it has gone, if anything has.
        foresee: says what it would cost, where that can be known beforehand.
        after: is done on every run, on a hit too: idempotent marks such as tags.
        always: the step looks for itself whether there is something to do.
        light: it is done in the process of `main`; the others get one of their own.
    """

    name: str
    summary: str
    parameters: tuple[str, ...]
    inputs: Callable[[Request, StepCache], dict[str, Input]]
    settings: Callable[[Request], dict[str, Any]]
    work: Callable[[Work], None]
    module: str | None = None
    copies: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()
    still_there: Callable[[Entry], str | None] | None = None
    after: Callable[[Request, Entry], None] | None = None
    foresee: Callable[[Request, Mapping[str, Input]], str | None] | None = None
    always: bool = False
    light: bool = False

    @property
    def all_parameters(self) -> tuple[str, ...]:
        return ("profile", *self.parameters, *(name for name in SHARED if name != "profile"))

    @property
    def closure(self) -> Closure:
        """The code and the libraries whose change makes earlier output stale."""
        return closure((self.module or f"phi3_mlflow.stages.{self.name}", *self.copies))


@dataclass(frozen=True)
class Outcome:
    """How a step ended."""

    step: str
    entry: Entry
    hit: bool
    run_id: str

    @property
    def record(self) -> dict[str, Any]:
        """The names of an output that lives in MLflow."""
        return read_record(self.entry)


def read_record(entry: Entry) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((entry.path / RECORD_NAME).read_text("utf-8"))
    return content


@dataclass(frozen=True)
class Plan:
    """What a step would do, before it does it."""

    step: Step
    request: Request
    inputs: Mapping[str, Input]
    parts: Mapping[str, Any]
    key: str


def plan(step: Step, request: Request, store: StepCache) -> Plan:
    """Find a step's inputs and the key of its output.

    Raises:
        UserError: an input is missing; the message says which command makes it.
    """
    inputs = step.inputs(request, store)
    parts = {
        "step": step.name,
        "settings": step.settings(request),
        "inputs": {name: given.digest for name, given in inputs.items()},
        "code": step.closure.hashes(),
        "libraries": library_versions(step),
    }
    return Plan(step, request, inputs, parts, key_of(parts))


def hit(planned: Plan, store: StepCache) -> Entry | None:
    """The output of a planned step, when it is in the cache, whole, and still in MLflow."""
    if planned.step.always or planned.request.flag("force"):
        return None
    entry = store.find(planned.step.name, planned.key)
    if entry is None:
        return None
    if planned.step.still_there and (gone := planned.step.still_there(entry)):
        console.say(f"{planned.step.name}: {gone}; doing it again")
        return None
    return entry


def carry_out(step: Step, request: Request, *, parent_run_id: str | None = None) -> Outcome:
    """Do a step, or find that it is done; record either as an MLflow run.

    Args:
        step: which one.
        request: the profile and the parameters.
        parent_run_id: the run of `main`, when it is that which runs the step.

    Raises:
        ProjectError: whatever goes wrong for a reason that a person can mend.
    """
    from phi3_mlflow.tracking.runs import step_run

    store = StepCache()
    store.sweep()
    with ExitStack() as held:
        with store.settling():
            planned = plan(step, request, store)
            held.enter_context(store.using(given.entry for given in planned.inputs.values()))
        run = held.enter_context(step_run(step.name, request, parent_run_id))
        held.enter_context(store.locked(step.name, planned.key))
        run.log_settings(planned.parts["settings"], planned.inputs)
        entry = hit(planned, store)
        was_there = entry is not None
        if entry is None:
            console.say(f"{step.name}: {step.summary}")
            entry = _do(planned, run, store)
        else:
            console.say(f"{step.name}: nothing to do, the output is in the cache")
            run.point_to(entry)
        if step.after:
            step.after(request, entry)
        store.set_latest(request.profile.name, slot(step.name), entry.key)
        run.finish(step.name, entry, was_there)
    return Outcome(step.name, entry, was_there, run.run_id)


def _do(planned: Plan, run: StepRun, store: StepCache) -> Entry:
    step = planned.step
    origin = {
        "parts": planned.parts,
        "run_id": run.run_id,
        "tracking_uri": run.tracking_uri,
        "time": time.time(),
    }
    with store.building(step.name, planned.key, origin) as out:
        settings = planned.parts["settings"]
        work = Work(planned.request, planned.inputs, out, run, store, planned.key, settings)
        step.work(work)
        origin["metrics"] = dict(work.metrics)
        origin["cost"] = run.cost()
    entry = store.find(step.name, planned.key)
    if entry is None:  # nobody else writes under this lock
        raise RuntimeError(f"{step.name}: the output that was just written is not whole")
    return entry


def slot(step: str) -> str:
    """Under which name a step's latest output is remembered."""
    if step not in IN_MLFLOW:
        return step
    from phi3_mlflow.tracking.runs import tracking_identity

    return f"{step}-{key_of({'tracking': tracking_identity()})[:12]}"


CHECKPOINT = "a Hugging Face checkpoint"
ONNX = "an ONNX model that onnxruntime-genai opens"


def folder_input(request: Request, store: StepCache, name: str, before: str, what: str) -> Input:
    """The folder that a parameter names, or with `auto` what the step before left.

    Args:
        request, store: where to look.
        name: the parameter.
        before: the step that makes such a folder.
        what: what it has to be, for the message.

    Raises:
        UserError: there is none.
    """
    if request.is_auto(name):
        return entry_input(preceding_output(request, store, name, before))
    return directory_input(name, request.value(name), what)


def directory_input(name: str, text: str, what: str) -> Input:
    """A folder that the user named.

    Raises:
        UserError: it is not a folder, or its content differs from its own manifest.
    """
    path = Path(text).expanduser()
    if entry := StepCache().holding(path):
        return entry_input(entry)
    if not path.is_dir():
        raise UserError(f"parameter: {name} = {text!r}: there is no folder {path.absolute()}")
    found = Manifest.of_directory(path)
    if not found.files:
        raise UserError(f"parameter: {name} = {text!r}: the folder is empty; expected {what}")
    if (path / MANIFEST_NAME).is_file() and (problems := Manifest.read(path).differences(path)):
        raise UserError(
            f"parameter: {name} = {text!r}: the files differ from their {MANIFEST_NAME}: "
            + "; ".join(problems[:5])
        )
    return Input(str(path.absolute()), found.digest)


def preceding_output(request: Request, store: StepCache, name: str, *steps: str) -> Entry:
    """What one of the steps before last left for the profile.

    Args:
        request, store: where to look.
        name: the parameter that wants it, for the message.
        steps: the step that makes it.

    Raises:
        UserError: there is nothing; the message says which command makes it.
    """
    profile = request.profile.name
    for step in steps:
        if entry := store.latest(profile, step, slot(step)):
            return entry
    raise UserError(
        f"parameter: {name} = 'auto': step {steps[0]} has left nothing for profile {profile} in "
        f"{store.root}.\nRun  mlflow run . -e {steps[0]} -P profile={profile}  first, or name one: "
        f"-P {name}=..."
    )


def entry_input(entry: Entry) -> Input:
    """A cached output as the next step's input."""
    return Input(str(entry.path), entry.manifest.digest, entry=entry)


def figures(report: Any) -> dict[str, float]:
    """The numbers in a dataclass, as metrics; wall time is left to the run's own."""
    values = {f.name: getattr(report, f.name) for f in fields(report) if f.name != "seconds"}
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def library_versions(*steps: Step) -> dict[str, str]:
    """The libraries that decide what some steps make, with the versions installed here."""
    names = {name for step in steps for name in (*step.closure.libraries, *step.libraries)}
    return {name: version_of(name) for name in sorted(names)}
