"""Look after the cache of step outputs: list it, check it, make it smaller.

    mlflow run . -e cache
    python -m steps.cache --do size
    python -m steps.cache --do verify
    python -m steps.cache --do prune --older-than 30d
    python -m steps.cache --do prune --max-size 20GB

`size` adds up by step, with what unfinished downloads take. `verify` reads every file and removes
what is damaged; it will be made again when it is needed. `prune` removes what has not been used
for a time, or the longest unused until the rest fits; never what a running step reads or builds.
Without either limit it removes what no profile's last run left. Unfinished downloads go by their
age, too.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

from phi3_mlflow.artifacts.cache import Entry, StepCache
from phi3_mlflow.config.parameters import AUTO, Request
from phi3_mlflow.core import console
from phi3_mlflow.core.console import summary_line
from phi3_mlflow.core.errors import UserError, problem_list
from phi3_mlflow.pipeline.command import Command

if TYPE_CHECKING:
    from collections.abc import Iterable

_SECONDS = {"h": 3600, "d": 86400, "w": 604800}
_BYTES = {"MB": 10**6, "GB": 10**9, "TB": 10**12}


class Cache(Command):
    """Looking after the step cache."""

    name = "cache"
    parameters = ("do", "older_than", "max_size", "quiet")

    def run(self, request: Request) -> None:
        age, size = limits(request)
        cache = StepCache()
        cache.sweep()
        entries = cache.entries()
        action = request.value("do")
        removed: list[Entry] = []
        if action == "list":
            for entry in entries:
                console.say(line(entry))
        elif action == "size":
            for said in sizes(cache, entries):
                console.say(said)
        elif action == "verify":
            removed = remove(cache, verify(cache, entries))
        else:
            removed = prune(cache, entries, age, size)
        gone = {(entry.step, entry.key) for entry in removed}
        left = [entry for entry in entries if (entry.step, entry.key) not in gone]
        print(
            summary_line(
                step="cache", status="done", action=action, outputs=len(left),
                size_mb=megabytes(left), removed=len(removed), removed_mb=megabytes(removed),
                cache=cache.root,
            ),
            flush=True,
        )  # fmt: skip


def limits(request: Request) -> tuple[float | None, int | None]:
    """The age in seconds and the size in bytes that were asked for.

    Raises:
        UserError: either is not of the form it has to have.
    """
    age, problems = _read(request, "older_than", _SECONDS, "12h, 30d or 8w")
    size, more = _read(request, "max_size", _BYTES, "500MB, 20GB or 1TB")
    if problems + more:
        raise UserError(problem_list("These parameters are wrong", problems + more))
    return age, None if size is None else int(size)


def _read(
    request: Request, name: str, units: dict[str, int], examples: str
) -> tuple[float | None, list[str]]:
    text = request.value(name)
    if text == AUTO:
        return None, []
    match = re.fullmatch(rf"([0-9]+(?:\.[0-9]+)?)({'|'.join(units)})", text)
    if not match:
        return None, [f"parameter: {name} = {text!r}: write it like {examples}"]
    return float(match[1]) * units[match[2]], []


def line(entry: Entry) -> str:
    """What a person reads of an output."""
    days = (time.time() - entry.used_at) / 86400
    size = entry.manifest.total_bytes / 1e6
    return f"  {entry.step:<9} {entry.key}  {size:>9.1f} MB  unused for {days:.1f} days"


def sizes(cache: StepCache, entries: Iterable[Entry]) -> list[str]:
    """What each step's outputs take, the largest first, and what was downloaded so far."""
    by_step: dict[str, list[Entry]] = {}
    for entry in entries:
        by_step.setdefault(entry.step, []).append(entry)
    ordered = sorted(by_step.items(), key=lambda item: -megabytes(item[1]))
    lines = [
        f"  {step:<20} {megabytes(mine):>9.1f} MB  {len(mine)} outputs" for step, mine in ordered
    ]
    if partial := cache.unfinished_downloads():
        lines.append(f"  {'unfinished downloads':<20} {partial / 1e6:>9.1f} MB")
    return lines


def verify(cache: StepCache, entries: Iterable[Entry]) -> list[Entry]:
    """The outputs that are damaged; says what is wrong with each."""
    damaged = []
    for entry in entries:
        problems = cache.damage(entry)
        console.say(f"{line(entry)}  {'damaged' if problems else 'whole'}")
        for problem in problems[:5]:
            console.say(f"    {problem}")
        if problems:
            damaged.append(entry)
    return damaged


def prune(
    cache: StepCache, entries: list[Entry], age: float | None, size: int | None
) -> list[Entry]:
    """Remove by age, then by size, the longest unused first; without limits, what is not latest."""
    if (age is not None or size is None) and (freed := cache.drop_downloads(age or 0)):
        console.say(f"  unfinished downloads, {freed / 1e6:.1f} MB  removed")
    if age is None and size is None:
        latest = cache.latest_keys()
        return remove(cache, [entry for entry in entries if (entry.step, entry.key) not in latest])
    now = time.time()
    old = [entry for entry in entries if age is not None and now - entry.used_at > age]
    removed = remove(cache, old)
    if size is not None:
        left = [entry for entry in entries if entry not in removed]
        total = sum(entry.manifest.total_bytes for entry in left)
        for entry in left:
            if total <= size:
                break
            if done := remove(cache, [entry]):
                removed += done
                total -= entry.manifest.total_bytes
    return removed


def remove(cache: StepCache, entries: Iterable[Entry]) -> list[Entry]:
    """Remove outputs that nobody uses; gives those that are gone."""
    removed = []
    for entry in entries:
        if cache.remove(entry):
            console.say(f"{line(entry)}  removed")
            removed.append(entry)
        else:
            console.say(f"{line(entry)}  kept: it is in use")
    return removed


def megabytes(entries: Iterable[Entry]) -> float:
    """The size of some outputs together, in MB."""
    return round(sum(entry.manifest.total_bytes for entry in entries) / 1e6, 1)


COMMAND = Cache()
