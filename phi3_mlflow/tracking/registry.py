"""The Model Registry: versions with their tags, the aliases, and moving them.

A version is never changed after it was registered but for its tags and description. Aliases:
`challenger` is the version that was registered last, `champion` the one that passed the gate.
"""

from __future__ import annotations

import getpass
import random
import re
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from phi3_mlflow.core.errors import EnvironmentProblem, GateRefused, UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

LOGGED = "logged_model"  # the tag that says which logged model a version is
CHALLENGER = "challenger"
CHAMPION = "champion"

VERSION_TAGS = (
    "flavor",
    "precision",
    "algorithm",
    "source",
    "source_revision",
    "checkpoint_sha256",
    "artifact_sha256",
    "git_commit",
)
GATE_AGAINST = "gate_against"
"""The tag that holds the champion a version was compared with, as a version number."""
NO_CHAMPION = "none"
CLAIM = "promotion_claim"
_CLAIM_SECONDS = 30  # a move takes well under a second
_SHORTEST_WAIT = 0.1
_MOST_FAILURES = 5  # of one's own claim to be written; more is no coincidence
_TAG_LIMIT = 4000  # a registry tag's value may not be longer


@dataclass(frozen=True)
class VersionName:
    """A version of a registered model."""

    name: str
    version: str

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.version}"


def client() -> MlflowClient:
    from mlflow import MlflowClient

    from phi3_mlflow.tracking.runs import connect

    connect()
    return MlflowClient()


def register(model_uri: str, name: str, tags: Mapping[str, str], description: str) -> VersionName:
    """Make a logged model a version of a registered model, unless it is one already.

    Args:
        model_uri: a logged model, `models:/m-...` or `runs:/...`.
        name: the registered model; made when there is none.
        tags: of the version; values are cut to what the registry takes.
        description: of the version, Markdown.
    """
    import mlflow

    versions = client()
    # A run that was killed after this point has left its version: take that one up again.
    there = versions.search_model_versions(f"name = '{name}' and tags.{LOGGED} = '{model_uri}'")
    if there:
        return VersionName(name, str(there[0].version))
    result = mlflow.register_model(
        model_uri, name, tags={k: v[:_TAG_LIMIT] for k, v in tags.items()} | {LOGGED: model_uri}
    )
    made = VersionName(name, str(result.version))
    versions.update_model_version(name, made.version, description=description)
    return made


def set_alias(version: VersionName, alias: str) -> None:
    """Point an alias at a version, unless it points there already."""
    versions = client()
    if alias_of(version.name, alias) != version.version:
        versions.set_registered_model_alias(version.name, alias, version.version)


def alias_of(name: str, alias: str) -> str | None:
    """The version that an alias points to, or None."""
    from mlflow.exceptions import MlflowException

    try:
        return str(client().get_model_version_by_alias(name, alias).version)
    except MlflowException as error:
        if _is_missing(error):
            return None
        raise


def exists(version: VersionName) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        client().get_model_version(version.name, version.version)
    except MlflowException as error:
        if _is_missing(error):
            return False
        raise
    return True


def describe(version: VersionName) -> ModelVersion:
    return client().get_model_version(version.name, version.version)


def set_tags(version: VersionName, tags: Mapping[str, str]) -> None:
    """Set a version's tags; what has the right value already is not written again."""
    versions = client()
    present = versions.get_model_version(version.name, version.version).tags
    for key, value in tags.items():
        if present.get(key) != value[:_TAG_LIMIT]:
            versions.set_model_version_tag(version.name, version.version, key, value[:_TAG_LIMIT])


def set_description(version: VersionName, text: str) -> None:
    """Set a version's description, unless it is that already."""
    if describe(version).description != text:
        client().update_model_version(version.name, version.version, description=text)


def find_version(text: str, name: str) -> VersionName:
    """The version that a parameter means.

    Args:
        text: a number, `models:/NAME/NUMBER`, `models:/NAME@ALIAS`, or `auto` for the challenger.
        name: the profile's registered model.

    Raises:
        UserError: it is in none of these forms, or there is no such version.
    """
    from mlflow.exceptions import MlflowException

    if text == "auto":
        found = alias_of(name, CHALLENGER)
        if found is None:
            raise UserError(
                f"parameter: version = 'auto': no version of {name} carries the alias "
                f"{CHALLENGER}.\nRun  mlflow run . -e register  first, or name a version: "
                "-P version=3"
            )
        return VersionName(name, found)
    if re.fullmatch(r"[1-9][0-9]*", text):
        text = f"models:/{name}/{text}"
    match = re.fullmatch(r"models:/([^/@:]+)(?:/([1-9][0-9]*)|@([\w.-]+))", text)
    if not match:
        raise UserError(
            f"parameter: version = {text!r}: allowed are a number, models:/NAME/NUMBER, "
            "models:/NAME@ALIAS and auto"
        )
    model, number, alias = match.groups()
    number = number or alias_of(model, alias)
    try:
        if number is None:
            raise UserError(f"parameter: version = {text!r}: {model} has no alias {alias}")
        client().get_model_version(model, number)
    except MlflowException as error:
        if not _is_missing(error):
            raise
        there = [v.version for v in client().search_model_versions(f"name='{model}'")]
        known = ", ".join(sorted(map(str, there), key=int)) or "none"
        raise UserError(
            f"parameter: version = {text!r}: {model} has no version {number}; it has: {known}"
        ) from error
    return VersionName(model, number)


def content(version: VersionName) -> str:
    """What a version holds: the sha256 of its artifact, empty when it was registered without."""
    return str(describe(version).tags.get("artifact_sha256", ""))


def logged_model_id(version: VersionName) -> str | None:
    """The id of the logged model that a version is, `m-...`, where it is one."""
    found = describe(version)
    tag = found.tags.get(LOGGED, "").partition("models:/")[2]
    return str(getattr(found, "model_id", None) or tag) or None


def same_content(one: VersionName, other: VersionName) -> bool:
    """Whether two versions are the same model, registered twice."""
    return bool(content(one)) and content(one) == content(other)


def number_of(uri: str | None) -> str:
    """The version in `models:/NAME/NUMBER`, or `NO_CHAMPION`."""
    return uri.rpartition("/")[2] if uri else NO_CHAMPION


def champion_to_beat(version: VersionName) -> VersionName | None:
    """The version that a candidate is compared with.

    It is the champion. A candidate that became champion itself is compared with the one it was
    compared with before that, so that its verdict does not change by having been acted on.
    """
    champion = alias_of(version.name, CHAMPION)
    if champion == version.version:
        champion = describe(version).tags.get(GATE_AGAINST, NO_CHAMPION)
    if champion is None or champion in (NO_CHAMPION, version.version):
        return None
    found = VersionName(version.name, champion)
    return found if exists(found) else None


@dataclass(frozen=True)
class Promotion:
    """What became of a promotion."""

    champion: VersionName
    before: str | None
    moved: bool
    reason: str

    def record(self) -> dict[str, Any]:
        return {
            "champion": self.champion.uri,
            "before": self.before,
            "moved": self.moved,
            "reason": self.reason,
        }


def promote(version: VersionName, *, force: bool) -> Promotion:
    """Move the alias `champion` to a version that passed the gate.

    Args:
        version: the candidate, evaluated before.
        force: move it whatever the gate said; recorded as forced.

    Raises:
        UserError: the version has not been evaluated, or against another champion than there is.
        GateRefused: the gate said no; the alias stays.
    """
    with _promotion_lock(version.name):
        if stays := _decide(version, force=force):
            return stays
        with _claimed(version.name):
            # Decided again: until the claim was ours, others could move the alias.
            if stays := _decide(version, force=force):
                return stays
            tags, before = describe(version).tags, alias_of(version.name, CHAMPION)
            decided = (
                tags.get("gate") == "passed"
                and tags.get("gate_decision", "promote") == "promote"
                and tags.get(GATE_AGAINST, NO_CHAMPION) == (before or NO_CHAMPION)
            )
            reason = tags.get("gate_reasons") or "the gate passed"
            if not decided:
                reason = f"forced; the gate: {tags.get('gate', 'not run')}"
            _move(version, before, reason, forced=not decided)
        return Promotion(version, before, True, reason)


def _decide(version: VersionName, *, force: bool) -> Promotion | None:
    """None when the alias is to move; otherwise why it stays. Raises as `promote` does."""
    tags, before = describe(version).tags, alias_of(version.name, CHAMPION)
    gate = tags.get("gate")
    if gate is None and not force:
        raise UserError(
            f"{version.uri} has not been evaluated, so there is no verdict to act on.\n"
            f"Run  mlflow run . -e evaluate -P version={version.uri}  first."
        )
    if gate != "passed" and not force:
        stays = f"stays with version {before}" if before else "stays unset"
        raise GateRefused(
            f"the gate refuses {version.uri}; the alias {CHAMPION} {stays}.\n"
            f"{tags.get('gate_reasons', '')}"
        )
    if before == version.version:
        return Promotion(version, before, False, "it was the champion already")
    champion = VersionName(version.name, before) if before else None
    if champion and not force and (reason := _reason_to_stay(version, champion, tags)):
        return Promotion(champion, before, False, reason)
    return None


def _reason_to_stay(
    version: VersionName, champion: VersionName, tags: Mapping[str, str]
) -> str | None:
    """Why a version that keeps to the thresholds does not take the champion's place.

    Raises:
        UserError: it was not compared with the champion there is.
    """
    if same_content(version, champion):
        return f"{version.uri} is the same model"
    compared = tags.get(GATE_AGAINST, NO_CHAMPION)
    if compared != champion.version:
        with_what = "no champion" if compared == NO_CHAMPION else f"version {compared}"
        raise UserError(
            f"{version.uri} was compared with {with_what}, but the {CHAMPION} is now version "
            f"{champion.version}: the verdict says nothing about the two.\n"
            f"Run  mlflow run . -e evaluate -P version={version.uri}  again, or force=true."
        )
    if tags.get("gate_decision") == "keep":
        return f"{version.uri} is not promoted: {tags.get('gate_reasons', '')}"
    return None


def rollback(name: str) -> Promotion:
    """Give the alias `champion` back to the version that had it before.

    Raises:
        UserError: there is no champion, or none before it.
    """
    with _promotion_lock(name):
        _before(name)  # nothing is claimed for what cannot be done
        with _claimed(name):
            current, target = _before(name)
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
    version: VersionName, before: str | None, reason: str, *, forced: bool, keep_from: bool = False
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
    from filelock import FileLock

    from phi3_mlflow.artifacts.cache import cache_root, key_of
    from phi3_mlflow.tracking.runs import connect

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


def _is_missing(error: Any) -> bool:
    missing: Literal["RESOURCE_DOES_NOT_EXIST"] = "RESOURCE_DOES_NOT_EXIST"
    no_alias = "alias" in str(error) and "not found" in str(error)
    return bool(error.error_code == missing or no_alias)
