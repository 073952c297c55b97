"""Look after the cache of step outputs: list it, check it, make it smaller.

    mlflow run . --env-manager local -e cache
    python -m steps.cache --do size
    python -m steps.cache --do verify
    python -m steps.cache --do prune --older-than 30d
    python -m steps.cache --do prune --max-size 20GB --dry-run true

`size` adds up by step, with what unfinished downloads take. `verify` reads every file and removes
what is damaged; it will be made again when it is needed. It also reads the files of the models that
were logged from here, and names those that are damaged: the next `main` logs them anew. `prune`
removes what has not been used for a time, or the longest unused until the rest fits; without either
limit, all that nothing needs. Never what a running step reads or builds, what a profile's last run
left, or what a champion was made from and measured with. With `dry_run` it only says what would go.
Unfinished downloads go by their age, too.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from phi3_mlflow.artifacts.cache import Entry, StepCache
from phi3_mlflow.artifacts.provenance import read_provenance
from phi3_mlflow.config.parameters import AUTO, Request
from phi3_mlflow.core import console
from phi3_mlflow.core.console import summary_line
from phi3_mlflow.core.errors import UserError, problem_list
from phi3_mlflow.pipeline.command import Command
from phi3_mlflow.stages.records import LoggedModels
from phi3_mlflow.tracking import registry
from phi3_mlflow.tracking.connection import connect, tracking_identity
from phi3_mlflow.tracking.stored_files import trouble

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_SECONDS = {"h": 3600, "d": 86400, "w": 604800}
_BYTES = {"MB": 10**6, "GB": 10**9, "TB": 10**12}


class Cache(Command):
    """Looking after the step cache."""

    name = "cache"
    parameters = ("do", "older_than", "max_size", "dry_run", "quiet")

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
            verify_logged(entries)
        else:
            removed = prune(cache, entries, age, size, preview=request.flag("dry_run"))
        gone = {(entry.step, entry.key) for entry in removed}
        left = [entry for entry in entries if (entry.step, entry.key) not in gone]
        preview = action == "prune" and request.flag("dry_run")
        print(
            summary_line(
                step="cache", status="preview" if preview else "done", action=action,
                outputs=len(left), size_mb=megabytes(left), removed=len(removed),
                removed_mb=megabytes(removed), cache=cache.root,
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


def verify_logged(entries: Iterable[Entry]) -> None:
    """Read every byte of the models that `log` has left in the tracking store in use.

    What is damaged stays where it is: versions point to it, and the next `main` logs it anew.
    """
    for entry in entries:
        settings = entry.origin.get("parts", {}).get("settings", {})
        if entry.step != "log" or settings.get("tracking") != tracking_identity():
            continue
        connect()
        for model in LoggedModels.read(entry.path).models:
            found = trouble(model.model_id, thorough=True)
            console.say(f"  log       {model.model_id}  {found or 'whole'}")


def prune(
    cache: StepCache,
    entries: list[Entry],
    age: float | None,
    size: int | None,
    *,
    preview: bool = False,
) -> list[Entry]:
    """Remove by age, then by size, the longest unused first; without limits, what nothing needs.

    Args:
        cache: the cache.
        entries: its outputs, the longest unused first.
        age: seconds that an output was not used for; None for any.
        size: bytes that are to be left; None for any.
        preview: whether only to say what would be removed.

    Returns:
        What was, or would be, removed.
    """
    if age is not None or size is None:
        _prune_downloads(cache, age or 0, preview=preview)
    kept = needed(cache, entries, registered_contents())
    spare = [entry for entry in entries if (entry.step, entry.key) not in kept]
    now = time.time()
    if age is not None:
        going = [entry for entry in spare if now - entry.used_at > age]
    else:
        going = spare if size is None else []
    removed = remove(cache, going, preview=preview)
    if size is not None:
        total = sum(entry.manifest.total_bytes for entry in entries if entry not in removed)
        for entry in spare:
            if total <= size:
                break
            if entry not in removed and (done := remove(cache, [entry], preview=preview)):
                removed += done
                total -= entry.manifest.total_bytes
        if total > size:
            console.say(
                f"  {total / 1e6:.1f} MB stay: a profile's last run, a champion or a running step "
                "needs them"
            )
    return removed


def _prune_downloads(cache: StepCache, age: float, *, preview: bool) -> None:
    freed = cache.drop_downloads(age, preview=preview)
    if freed:
        words = "would be removed" if preview else "removed"
        console.say(f"  unfinished downloads, {freed / 1e6:.1f} MB  {words}")


def needed(
    cache: StepCache, entries: Iterable[Entry], contents: Iterable[str]
) -> set[tuple[str, str]]:
    """Step and key of what must not be pruned.

    Args:
        cache: the cache.
        entries: its outputs.
        contents: sha256 of models and checkpoints that the registry shows under an alias.

    Returns:
        What some profile's last run left, what the models of the registry were made from, and what
        was measured of, or computed from, any of these.
    """
    found = list(entries)
    kept = cache.latest_keys()
    known = set(contents)
    facts = set(known)
    for entry in found:
        about = read_provenance(entry.path)
        own = {str(about[key]) for key in _CONTENTS if key in about}
        made = about.get(_MADE_BY.get(entry.step, ""))
        if made in known:
            kept.add((entry.step, entry.key))
        if (entry.step, entry.key) in kept:
            facts |= own | {entry.manifest.digest}
    tracked = {step for step, _ in cache.latest_keys()} | set(_MADE_BY)
    for entry in found:
        # Measurements and computed states are nobody's last output: they belong to a model.
        if entry.step not in tracked and facts & set(_texts(entry.origin.get("parts"))):
            kept.add((entry.step, entry.key))
    return kept


_CONTENTS = ("artifact_sha256", "checkpoint_sha256", "quantized_sha256")
_MADE_BY = {
    "fetch": "checkpoint_sha256",
    "train": "checkpoint_sha256",
    "export": "artifact_sha256",
}
"""What the provenance of a step's output says of the output itself."""


def _texts(value: object) -> Iterator[str]:
    """Every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def registered_contents() -> set[str]:
    """sha256 of the artifacts and checkpoints of all versions that carry an alias.

    Raises:
        EnvironmentProblem: the tracking store does not answer, so that it is not known.
    """
    uri = tracking_identity()
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        return set()
    client = registry.client()
    contents = set()
    for model in client.search_registered_models():
        for number in set(model.aliases.values()):
            tags = client.get_model_version(model.name, number).tags
            contents |= {tags[key] for key in _CONTENTS if tags.get(key)}
    return contents


def remove(cache: StepCache, entries: Iterable[Entry], *, preview: bool = False) -> list[Entry]:
    """Remove outputs that nobody uses; gives those that are gone, or would be."""
    removed = []
    for entry in entries:
        if preview:
            console.say(f"{line(entry)}  would be removed")
            removed.append(entry)
        elif cache.remove(entry):
            console.say(f"{line(entry)}  removed")
            removed.append(entry)
        else:
            console.say(f"{line(entry)}  kept: it is in use")
    return removed


def megabytes(entries: Iterable[Entry]) -> float:
    """The size of some outputs together, in MB."""
    return round(sum(entry.manifest.total_bytes for entry in entries) / 1e6, 1)


COMMAND = Cache()
