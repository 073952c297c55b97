"""The steps of a run in their order: one list, which `main` follows and a dry run foretells."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from phi3_mlflow.config.parameters import Request
    from phi3_mlflow.config.profile import Profile
    from phi3_mlflow.pipeline.step import Outcome, Rec, Step


class Done:
    """The outcomes of the steps so far."""

    def __init__(self) -> None:
        self._outcomes: dict[str, Outcome[Any]] = {}

    def add(self, outcome: Outcome[Any]) -> None:
        """Take in what a step has ended with."""
        self._outcomes[outcome.step.name] = outcome

    def folder(self, *steps: Step[Any, Any]) -> Path:
        """The files that the first of some steps left, of those that were done.

        Raises:
            LookupError: none of them was.
        """
        for step in steps:
            if step in self:
                return self._outcomes[step.name].entry.path
        raise LookupError(f"none of {', '.join(step.name for step in steps)} was done")

    def record(self, step: Step[Any, Rec]) -> Rec:
        """The record that a step left."""
        record: Rec = self._outcomes[step.name].record
        return record

    def __contains__(self, step: Step[Any, Any]) -> bool:
        return step.name in self._outcomes


def always(profile: Profile) -> bool:
    """The condition of a step that every profile needs."""
    del profile
    return True


def goes_on(profile: Profile, done: Done) -> Profile:
    """The steps that follow are given the same profile."""
    del done
    return profile


@dataclass(frozen=True)
class Part:
    """A step in a sequence.

    Attributes:
        step: which one.
        takes: what it is given of what was made before it, by the name of its parameter.
        when: whether a profile needs it.
        then: the profile for the steps after it.
    """

    step: Step[Any, Any]
    takes: Callable[[Done], Mapping[str, object]]
    when: Callable[[Profile], bool] = always
    then: Callable[[Profile, Done], Profile] = goes_on


class Follower(ABC):
    """Something that steps are given to, one after another: a pipeline, or a dry run.

    Args:
        request: of `main`.
    """

    def __init__(self, request: Request) -> None:
        self._request = request

    @property
    def profile(self) -> Profile:
        """The profile that the next step is given."""
        return self._request.profile

    def go_on_with(self, profile: Profile) -> None:
        """Take another profile for the steps that are left."""
        self._request = replace(self._request, profile=profile)

    @abstractmethod
    def run(self, step: Step[Any, Rec], **results: object) -> Outcome[Rec]:
        """Do a step, or find it done."""


def follow(parts: Iterable[Part], follower: Follower) -> Done:
    """Give the steps that the profile needs to a follower, each with what was made before it."""
    done = Done()
    for part in parts:
        if part.when(follower.profile):
            done.add(follower.run(part.step, **part.takes(done)))
            follower.go_on_with(part.then(follower.profile, done))
    return done


def needed(parts: Iterable[Part], profile: Profile) -> list[Step[Any, Any]]:
    """The steps that a profile needs, as far as the profile alone says."""
    return [part.step for part in parts if part.when(profile)]
