"""The sequence of the steps under one parent run, each in a process of its own when it has work.

What is in the cache already is found here, so a run with nothing to do starts no process. A
process of its own gives a step its own peak of memory, and lets `main` say which step it was when
the system kills one for memory.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from phi3_mlflow.artifacts.cache import StepCache
from phi3_mlflow.core import console
from phi3_mlflow.core.errors import EXIT_DONE, EnvironmentProblem, StepFailed
from phi3_mlflow.pipeline.command_line import guarded
from phi3_mlflow.pipeline.sequence import Follower
from phi3_mlflow.pipeline.step import Outcome, PlannedStep, Rec, Step, carry_out, find_hit, plan

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from multiprocessing.context import BaseContext

    from phi3_mlflow.config.parameters import Request


class Pipeline(Follower, AbstractContextManager["Pipeline"]):
    """Runs steps one after another as children of a parent run.

    What a step has made is kept from being pruned until the whole is done.

    Args:
        request: of `main`.
        parent_run_id: the run that the steps' runs belong to.
        before_work: called once with the first step that has work to do, before it is done.
    """

    def __init__(
        self,
        request: Request,
        parent_run_id: str,
        before_work: Callable[[Step[Any, Any]], None] | None = None,
    ) -> None:
        super().__init__(request)
        self._before_work = before_work
        self._parent = parent_run_id
        self._cache = StepCache()
        self._held = ExitStack()
        self._processes: BaseContext | None = None
        self.outcomes: list[Outcome[Any]] = []

    def __exit__(self, *exception: object) -> None:
        self._held.close()

    def run(self, step: Step[Any, Rec], **results: object) -> Outcome[Rec]:
        """Do a step, or find it done.

        Args:
            step: which one.
            results: what the steps before made, by the name of the parameter that takes it.

        Raises:
            StepFailed: it ended badly; it has said why.
            EnvironmentProblem: it was killed.
            ProjectError: what a step done in this process raises.
        """
        request = for_step(self._request, step, results)
        with self._cache.settling():
            planned = plan(step, request, self._cache)
            there = find_hit(planned, self._cache)
            self._held.enter_context(self._cache.using([there]))
        if there is None and step.cached and self._before_work is not None:
            before_work, self._before_work = self._before_work, None
            before_work(step)
        if step.in_main_process or there:
            outcome = carry_out(step, request, parent_run_id=self._parent)
        else:
            outcome = self._in_process(planned)
        self._held.enter_context(self._cache.using([outcome.entry]))
        self.outcomes.append(outcome)
        return outcome

    def outcome(self, step: Step[Any, Rec]) -> Outcome[Rec]:
        """How a step ended that was done.

        Raises:
            LookupError: it was not.
        """
        for outcome in self.outcomes:
            if outcome.step is step:
                return outcome
        raise LookupError(f"{step.name} was not done")

    def _in_process(self, planned: PlannedStep[Any]) -> Outcome[Any]:
        step = planned.step
        if self._processes is None:
            self._processes = _context()
        process = self._processes.Process(  # type: ignore[attr-defined]
            target=_child, args=(step, planned.request, self._parent), name=step.name
        )
        process.start()
        try:
            process.join()
        except BaseException:  # stopped from outside: the step has to stop first
            process.terminate()
            process.join()
            raise
        code = process.exitcode
        if code < 0:
            raise EnvironmentProblem(_killed(step.name, -code))
        if code != EXIT_DONE:
            raise StepFailed(step.name, code)
        entry = self._cache.find(step.name, planned.key)
        if entry is None:
            raise EnvironmentProblem(
                f"step {step.name} ended well, but its output is not in {self._cache.root}; "
                "was the cache pruned, or the code changed, in the meantime? Run it again."
            )
        return Outcome(step, entry, False, str(entry.origin.get("run_id", "")))


def for_step(request: Request, step: Step[Any, Any], results: Mapping[str, object]) -> Request:
    """What `main` asks of one of its steps.

    Args:
        request: of `main`.
        step: which step.
        results: what the steps before made, by the name of the parameter that takes it.
    """
    own = request.values
    values = {name: own[name] for name in step.parameters if name in own}
    forced = step.cached and request.value("force") in ("all", step.name)
    return replace(request, values={**values, "force": str(forced).lower()}, results=results)


def _context() -> BaseContext:
    """Processes that start with MLflow imported where the platform allows it, and clean."""
    import multiprocessing

    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mlflow", "mlflow.pyfunc", "phi3_mlflow.pipeline.step"])
    return context


def _child(step: Step[Any, Any], request: Request, parent_run_id: str) -> None:
    """What a step's process does."""
    os.environ.pop("MLFLOW_RUN_ID", None)  # that is main's own
    console.set_quiet(request.flag("quiet"))
    sys.exit(guarded(step.name, lambda: carry_out(step, request, parent_run_id=parent_run_id)))


def _killed(step: str, number: int) -> str:
    name = signal.Signals(number).name
    if number != signal.SIGKILL:
        return f"step {step} was ended by {name}"
    return (
        f"step {step} was killed ({name}); the usual reason is that the machine ran out of memory."
        "\nClose other programs or take a machine with more memory; what was finished before is in "
        "the cache, so the next run goes on from there."
    )
