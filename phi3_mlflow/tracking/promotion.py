"""Moving the alias `champion`: promotion, rollback, and taking turns with others who move it."""

from __future__ import annotations

import getpass
import random
import socket
import time
import uuid
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from filelock import FileLock

from phi3_mlflow.artifacts.cache import cache_root, key_of
from phi3_mlflow.core.errors import EnvironmentProblem, GateRefused, UserError
from phi3_mlflow.core.hints import run_command
from phi3_mlflow.tracking.connection import connect
from phi3_mlflow.tracking.registry import (
    CHAMPION,
    GATE_AGAINST,
    NO_CHAMPION,
    NOT_GATED,
    PASSED,
    VersionName,
    alias_of,
    client,
    damage,
    describe,
    exists,
    same_content,
    set_tags,
)
from phi3_mlflow.tracking.stored_files import refuse_damaged

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

CLAIM = "promotion_claim"
_CLAIM_SECONDS = 30  # a move takes well under a second
_SHORTEST_WAIT = 0.1
_MOST_FAILURES = 5  # of one's own claim to be written; more is no coincidence


@dataclass(frozen=True)
class Promotion:
    """What became of a promotion."""

    champion: VersionName
    before: str | None
    moved: bool
    reason: str


Allowed = Callable[[VersionName], None]
"""Raises when a version may not become champion, whatever the gate said."""


def promote(
    version: VersionName, *, overrule: bool, allowed: Allowed = lambda version: None
) -> Promotion:
    """Move the alias `champion` to a version that passed the gate.

    Args:
        version: the candidate, evaluated before.
        overrule: move it whatever the gate said; recorded as forced.
        allowed: asked before the alias moves; no overruling helps against it.

    Raises:
        UserError: the version has not been evaluated, or against another champion than there is.
        GateRefused: the gate said no; the alias stays.
        EnvironmentProblem: the version's files are damaged.
    """
    refuse_damaged(version.uri)
    with _promotion_lock(version.name):
        if stays := _decide(version, overrule=overrule):
            return stays
        allowed(version)  # may read gigabytes, which nobody's claim lasts for
        with _claimed(version.name):
            # Decided again: until the claim was ours, others could move the alias.
            if stays := _decide(version, overrule=overrule):
                return stays
            tags, before = (
                describe(version).tags,
                alias_of(version.name, CHAMPION),
            )
            forced, reason = _why_it_moves(version, before, tags)
            _move(version, before, reason, forced=forced)
        return Promotion(version, before, True, reason)


def _decide(version: VersionName, *, overrule: bool) -> Promotion | None:
    """None when the alias is to move; otherwise why it stays. Raises as `promote` does."""
    tags, before = (
        describe(version).tags,
        alias_of(version.name, CHAMPION),
    )
    gate = tags.get("gate")
    if gate is None and not overrule:
        raise UserError(
            f"{version.uri} has not been evaluated, so there is no verdict to act on.\n"
            f"Run  {run_command('evaluate', version=version.uri)}  first."
        )
    if gate not in (PASSED, NOT_GATED) and not overrule:
        stays = f"stays with version {before}" if before else "stays unset"
        raise GateRefused(
            f"the gate refuses {version.uri}; the alias {CHAMPION} {stays}.\n"
            f"{tags.get('gate_reasons', '')}"
        )
    if before == version.version:
        return Promotion(version, before, False, "it was the champion already")
    champion = VersionName(version.name, before) if before else None
    if champion and not overrule and (reason := _reason_to_stay(version, champion, tags)):
        return Promotion(champion, before, False, reason)
    return None


def _why_it_moves(
    version: VersionName, before: str | None, tags: Mapping[str, str]
) -> tuple[bool, str]:
    """Whether the gate was overruled, and why the alias moves."""
    compared = tags.get(GATE_AGAINST, NO_CHAMPION) == (before or NO_CHAMPION)
    gate, decision = tags.get("gate"), tags.get("gate_decision", "promote")
    if gate in (PASSED, NOT_GATED) and before:
        champion = VersionName(version.name, before)
        if same_content(version, champion) and (found := damage(champion)):
            return False, f"it is the same model as the champion, {champion.uri}: {found}"
    if decision == "promote" and (gate == NOT_GATED or (gate == PASSED and compared)):
        return False, tags.get("gate_reasons") or "the gate passed"
    return True, f"forced; the gate: {gate or 'not run'}"


def _reason_to_stay(
    version: VersionName, champion: VersionName, tags: Mapping[str, str]
) -> str | None:
    """Why a version that keeps to the thresholds does not take the champion's place.

    Raises:
        UserError: it was not compared with the champion there is.
    """
    if same_content(version, champion):
        return None if damage(champion) else f"{version.uri} is the same model"
    if tags.get("gate") == NOT_GATED and tags.get("gate_decision") == "promote":
        return None
    compared = tags.get(GATE_AGAINST, NO_CHAMPION)
    if compared != champion.version:
        with_what = "no champion" if compared == NO_CHAMPION else f"version {compared}"
        raise UserError(
            f"{version.uri} was compared with {with_what}, but the {CHAMPION} is now version "
            f"{champion.version}: the verdict says nothing about the two.\n"
            f"Run  {run_command('evaluate', version=version.uri)}  again, or overrule=true."
        )
    if tags.get("gate_decision") == "keep":
        return f"{version.uri} is not promoted: {tags.get('gate_reasons', '')}"
    return None


def rollback(name: str, allowed: Allowed = lambda version: None) -> Promotion:
    """Give the alias `champion` back to the version that had it before.

    Args:
        name: of the registered model.
        allowed: asked before the alias moves.

    Raises:
        UserError: there is no champion, or none before it.
        EnvironmentProblem: the files of the one before it are damaged.
    """
    with _promotion_lock(name):
        # Nothing is claimed for what cannot be done.
        _, checked = _before(name)
        refuse_damaged(checked.uri)
        allowed(checked)
        with _claimed(name):
            current, target = _before(name)
            if target != checked:
                allowed(target)
            # The way further back is kept: the target keeps its own `promoted_from`.
            _move(target, current, f"rollback from version {current}", forced=False, keep_from=True)
        return Promotion(target, current, True, f"rolled back from version {current}")


def _before(name: str) -> tuple[str, VersionName]:
    """The champion, and the one before it. Raises as `rollback` does."""
    current = alias_of(name, CHAMPION)
    if current is None:
        raise UserError(f"{name} has no {CHAMPION}, so there is nothing to roll back")
    before = describe(VersionName(name, current)).tags.get("promoted_from", "")
    if not before or not exists(VersionName(name, before)):
        raise UserError(
            f"{name} version {current} is the first {CHAMPION}: there is none before it to "
            "roll back to"
        )
    return current, VersionName(name, before)


def _move(
    version: VersionName,
    before: str | None,
    reason: str,
    *,
    forced: bool,
    keep_from: bool = False,
) -> None:
    """Move the alias; tags first, so that an alias never stands on a version without a reason.

    Raises:
        EnvironmentProblem: the alias is not where it was when the decision was made.
    """
    now = alias_of(version.name, CHAMPION)
    if now != before:
        raise EnvironmentProblem(
            f"the alias {CHAMPION} of {version.name} moved from version {before or 'none'} to "
            f"{now or 'none'} while this promotion was at work; nothing was changed. Run it again."
        )
    tags = {
        "promoted_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "promoted_by": f"{_user()}@{socket.gethostname()}",
        "promotion_reason": reason,
        "promotion_forced": str(forced).lower(),
    }
    if not keep_from:
        tags["promoted_from"] = before or ""
    set_tags(version, tags)
    client().set_registered_model_alias(version.name, CHAMPION, version.version)
    if (now := alias_of(version.name, CHAMPION)) != version.version:
        raise EnvironmentProblem(
            f"the alias {CHAMPION} of {version.name} was given to version {version.version}, but "
            f"stands on {now or 'none'}: somebody else moved it in the same moment, without taking "
            "turns. Look at both, and promote again the one you want."
        )


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # no entry in the password database, as in many containers
        return "unknown"


@contextmanager
def _promotion_lock(name: str) -> Iterator[None]:
    """One promotion of a registered model at a time, among the processes of this machine."""
    locks = cache_root() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    key = key_of({"registry": connect(), "name": name})
    with FileLock(str(locks / f"promote-{key}.lock")):
        yield


@contextmanager
def _claimed(name: str) -> Iterator[None]:
    """One move of a registered model's alias at a time, among all machines that share a registry.

    MLflow's registry has no compare-and-set, so this is Fischer's algorithm on a tag of the
    registered model: wait until nobody claims it, write one's own name, wait longer than a write
    takes, and go on if the name still stands. It holds as long as no write takes longer than that
    wait, which is measured anew each time; `_move` looks at the alias before and after, so that a
    breach is reported and never silent. A claim whose owner died is void after a while.

    Raises:
        EnvironmentProblem: others held the claim for too long.
    """
    mine = uuid.uuid4().hex
    failures = 0
    end = time.monotonic() + 4 * _CLAIM_SECONDS
    while time.monotonic() < end:
        if _claim_of(name):
            time.sleep(random.uniform(0.05, 0.2))
            continue
        start = time.monotonic()
        try:
            client().set_registered_model_tag(name, CLAIM, f"{mine} {time.time():.3f}")
        except Exception as error:
            # Two that write a tag which is not there yet at the same moment: one of them fails.
            failures += 1
            if failures == _MOST_FAILURES or not _of_the_store(error):
                raise
            continue
        time.sleep(max(_SHORTEST_WAIT, 5 * (time.monotonic() - start)))
        if (_claim_of(name) or "").startswith(mine):
            break
    else:
        raise EnvironmentProblem(
            f"others are promoting versions of {name}; gave up after {4 * _CLAIM_SECONDS} s. "
            f"If nobody is, remove the tag {CLAIM} of the registered model."
        )
    try:
        yield
    finally:
        if (_claim_of(name) or "").startswith(mine):
            client().delete_registered_model_tag(name, CLAIM)


def _of_the_store(error: Exception) -> bool:
    """Whether it comes from MLflow, or from the database below it, which MLflow lets through."""
    return type(error).__module__.partition(".")[0] in ("mlflow", "sqlalchemy")


def _claim_of(name: str) -> str | None:
    """Who is moving the alias: a claim that is not void yet."""
    claim = client().get_registered_model(name).tags.get(CLAIM)
    if not claim:
        return None
    try:
        age = time.time() - float(claim.split()[1])
    except (IndexError, ValueError):
        return None
    return str(claim) if age < _CLAIM_SECONDS else None
