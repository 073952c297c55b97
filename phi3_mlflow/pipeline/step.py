"""What a step is, and how one is carried out: key, hit or work, record.

Every step is a class with the same methods; `carry_out` does the rest, the same way for a step that
is run alone and for one that `main` runs.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from phi3_mlflow.artifacts.cache import Entry, StepCache, key_of
from phi3_mlflow.artifacts.code_keys import Closure, closure, library_versions
from phi3_mlflow.artifacts.records import Record
from phi3_mlflow.core import console
from phi3_mlflow.pipeline.command import Command
from phi3_mlflow.tracking.connection import tracking_identity
from phi3_mlflow.tracking.runs import StepRun, step_run

if TYPE_CHECKING:
    from pathlib import Path

    from phi3_mlflow.artifacts.inputs import Input
    from phi3_mlflow.config.parameters import Request

In = TypeVar("In")
Rec = TypeVar("Rec", bound=Record)
Settings = Mapping[str, Any]
"""Typed JSON values that decide an output."""


class NoRecord(Record):
    """Of a step whose output is files in the cache."""


@dataclass(frozen=True)
class NoInputs:
    """Of a step that takes nothing."""


@dataclass
class Work(Generic[In]):
    """A step's work while it is being done.

    Attributes:
        request: the profile and the parameters.
        inputs: what the step takes.
        out: the empty directory to fill with the output; a step whose output is in MLflow leaves a
            `Record` there.
        run: the MLflow run of the step.
        cache: the step cache, for downloads.
        key: the output's cache key, the same for the same work.
        settings: the typed values that decide the output, as they went into the key.
        metrics: to log and keep with the output.
    """

    request: Request
    inputs: In
    out: Path
    run: StepRun
    cache: StepCache
    key: str
    settings: Settings
    metrics: dict[str, float] = field(default_factory=dict)


def step_parameters(*own: str) -> tuple[str, ...]:
    """The parameters of a step: its own between those that every step has."""
    return ("profile", *own, "force", "quiet")


class Step(Command, Generic[In, Rec]):
    """One step of the pipeline.

    A subclass says with its attributes how it is carried out, and with its methods what it takes,
    what decides its output, and what the work is. `In` is a frozen dataclass of `Input`s, `Rec` the
    record it leaves when its output lives in MLflow.

    Attributes:
        doing: what it does, in a few words, for the person watching.
        record_type: of the record it leaves.
        in_mlflow: its output lives in a tracking store, so that another store knows nothing of it.
        in_main_process: it is so light that `main` does it itself; the others get a process of
            their own, with its own peak of memory.
        cached: False for a step that looks for itself, each time, whether there is something to do.
        copies: modules that go into its output as they are, without being imported.
    """

    doing: ClassVar[str]
    choices = {"force": ("true", "false")}  # noqa: RUF012 (as in Command)
    record_type: ClassVar[type[Record]] = NoRecord
    in_mlflow: ClassVar[bool] = False
    in_main_process: ClassVar[bool] = False
    cached: ClassVar[bool] = True
    copies: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def inputs(self, request: Request, cache: StepCache) -> In:
        """Find what the step takes.

        Raises:
            UserError: it is missing; the message says which command makes it.
        """

    @abstractmethod
    def settings(self, request: Request) -> Settings:
        """The typed values that decide the output."""

    def decided(self, request: Request, inputs: In) -> Settings:
        """The same, with what is left open there decided by the inputs and the machine."""
        del inputs
        return self.settings(request)

    @abstractmethod
    def work(self, work: Work[In]) -> None:
        """Do it, and leave the output in `work.out`."""

    def missing(self, entry: Entry) -> str | None:
        """What of an output that lives in MLflow has gone, or None when all of it is there."""
        del entry
        return None

    def after(self, request: Request, entry: Entry) -> None:
        """Done on every run, also when the output was there: marks such as aliases and tags."""

    def run_name(self, request: Request, inputs: In) -> str:
        """What its run is called."""
        del inputs
        return f"{self.name} {request.profile.name}"

    def told(self, entry: Entry) -> Mapping[str, str]:
        """What its summary line says of its output besides where that is."""
        del entry
        return {}

    def foresee(self, request: Request, inputs: In) -> str | None:
        """What the work would cost, where that can be known beforehand."""
        del request, inputs
        return None

    def run(self, request: Request) -> None:
        """Do the step, or find that it is done; see `carry_out`."""
        carry_out(self, request)

    @property
    def closure(self) -> Closure:
        """The code and the libraries whose change makes earlier output stale."""
        return closure((type(self).__module__, *self.copies))

    @property
    def slot(self) -> str:
        """Under which name the step's latest output is remembered."""
        return slot(self.name, in_mlflow=self.in_mlflow)

    def record_of(self, entry: Entry) -> Rec:
        """The record in an output."""
        record: Rec = self.record_type.read(entry.path)  # type: ignore[assignment]
        return record


def slot(step: str, *, in_mlflow: bool) -> str:
    """Under which name a step's latest output is remembered: one per tracking store, if need be."""
    return f"{step}-{key_of({'tracking': tracking_identity()})[:12]}" if in_mlflow else step


@dataclass(frozen=True)
class Outcome(Generic[Rec]):
    """How a step ended.

    Attributes:
        step: which one.
        entry: its output.
        hit: whether that was there already.
        run_id: of the MLflow run that made it.
    """

    step: Step[Any, Rec]
    entry: Entry
    hit: bool
    run_id: str

    @property
    def record(self) -> Rec:
        """The names of an output that lives in MLflow."""
        return self.step.record_of(self.entry)


@dataclass(frozen=True)
class PlannedStep(Generic[In]):
    """A step before it is done: what it would take, and the key of what it would make."""

    step: Step[In, Any]
    request: Request
    inputs: In
    parts: Mapping[str, Any]
    key: str

    @property
    def input_entries(self) -> list[Entry | None]:
        """The cached outputs among its inputs."""
        return [given.entry for given in named_inputs(self.inputs).values()]


def named_inputs(inputs: object) -> dict[str, Input[Any]]:
    """The inputs of a step by the name of their parameter; those that it does not take left out."""
    found = {item.name: getattr(inputs, item.name) for item in fields(inputs)}  # type: ignore[arg-type]
    return {name: given for name, given in found.items() if given is not None}


def plan(step: Step[In, Any], request: Request, cache: StepCache) -> PlannedStep[In]:
    """Find a step's inputs and the key of its output.

    Raises:
        UserError: an input is missing; the message says which command makes it.
    """
    inputs = step.inputs(request, cache)
    parts = {
        "step": step.name,
        "settings": step.decided(request, inputs),
        "inputs": {name: given.identity for name, given in named_inputs(inputs).items()},
        "code": step.closure.hashes(),
        "libraries": library_versions([step.closure]),
    }
    return PlannedStep(step, request, inputs, parts, key_of(parts))


def find_hit(planned: PlannedStep[Any], cache: StepCache) -> Entry | None:
    """The output of a planned step, when it is in the cache, whole, and still in MLflow."""
    step = planned.step
    if not step.cached or planned.request.flag("force"):
        return None
    entry = cache.find(step.name, planned.key)
    if entry is None:
        return None
    if missing := step.missing(entry):
        console.say(f"{step.name}: {missing}; doing it again")
        return None
    return entry


def carry_out(
    step: Step[Any, Rec], request: Request, *, parent_run_id: str | None = None
) -> Outcome[Rec]:
    """Do a step, or find that it is done; record either as an MLflow run.

    Args:
        step: which one.
        request: the profile and the parameters.
        parent_run_id: the run of `main`, when it is that which runs the step.

    Raises:
        ProjectError: whatever goes wrong for a reason that a person can mend.
    """
    cache = StepCache()
    cache.sweep()
    with ExitStack() as held:
        with cache.settling():
            planned = plan(step, request, cache)
            held.enter_context(cache.using(planned.input_entries))
        name = step.run_name(request, planned.inputs)
        run = held.enter_context(step_run(step.name, request.profile.name, parent_run_id, name))
        held.enter_context(cache.locked(step.name, planned.key))
        run.log_settings(planned.parts["settings"], named_inputs(planned.inputs))
        entry = find_hit(planned, cache)
        was_there = entry is not None
        if entry is None:
            console.say(f"{step.name}: {step.doing}")
            entry = _do(planned, run, cache)
        else:
            console.say(f"{step.name}: nothing to do, the output is in the cache")
            run.point_to(entry)
        step.after(request, entry)
        cache.set_latest(request.profile.name, step.slot, entry.key)
        run.finish(step.name, entry, was_there, step.told(entry))
    return Outcome(step, entry, was_there, run.run_id)


def _do(planned: PlannedStep[Any], run: StepRun, cache: StepCache) -> Entry:
    step = planned.step
    origin = {
        "parts": planned.parts,
        "run_id": run.run_id,
        "tracking_uri": run.tracking_uri,
        "time": time.time(),
    }
    with cache.building(step.name, planned.key, origin) as out:
        settings = planned.parts["settings"]
        work = Work(planned.request, planned.inputs, out, run, cache, planned.key, settings)
        step.work(work)
        origin["metrics"] = dict(work.metrics)
        origin["cost"] = run.cost()
    entry = cache.find(step.name, planned.key)
    if entry is None:  # nobody else writes under this lock
        raise RuntimeError(f"{step.name}: the output that was just written is not whole")
    return entry
