"""The Model Registry: registered models, their versions with tags, and the aliases.

A version is never changed after it was registered but for its tags and description. Aliases:
`challenger` is the version that was registered last, `champion` the one that passed the gate.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from phi3_mlflow.core.errors import UserError
from phi3_mlflow.core.hints import run_command
from phi3_mlflow.tracking.connection import connect
from phi3_mlflow.tracking.stored_files import LOGGED, model_id_of, trouble

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CONTENT = "content_key"
"""The tag that says what a logged model is, whoever logged it: files, contract, code, settings."""
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
"""The tags of every version."""
GATE_AGAINST = "gate_against"
"""The tag that holds the champion a version was compared with, as a version number."""
NO_CHAMPION = "none"
PASSED, FAILED, NOT_GATED = "passed", "failed", "not gated"
"""What the tag `gate` of a version says."""
_TAG_LIMIT = 4000  # a registry tag's value may not be longer


@dataclass(frozen=True)
class VersionName:
    """A version of a registered model."""

    name: str
    version: str

    @property
    def uri(self) -> str:
        """How MLflow names it."""
        return f"models:/{self.name}/{self.version}"


def client() -> MlflowClient:
    """MLflow's client, connected."""
    from mlflow import MlflowClient

    connect()
    return MlflowClient()


def register(model_uri: str, name: str, tags: Mapping[str, str], description: str) -> VersionName:
    """Make a logged model a version of a registered model, unless it is one already.

    Args:
        model_uri: a logged model, `models:/m-...` or `runs:/...`.
        name: the registered model; made when there is none.
        tags: of the version; values are cut to what the registry takes.
        description: of the version, Markdown.

    Returns:
        The new version; or the first that is the same logged model, or one of the same content.
    """
    import mlflow

    # A run that was killed after this point has left its version: take that one up again.
    if there := find_registered(name, LOGGED, model_uri):
        return there
    if tags.get(CONTENT) and (there := find_registered(name, CONTENT, tags[CONTENT])):
        return there
    versions = client()
    result = mlflow.register_model(
        model_uri, name, tags={k: v[:_TAG_LIMIT] for k, v in tags.items()} | {LOGGED: model_uri}
    )
    made = VersionName(name, str(result.version))
    versions.update_model_version(name, made.version, description=description)
    return made


def find_registered(name: str, tag: str, value: str) -> VersionName | None:
    """The first version with a tag whose logged model is still there, if there is one."""
    found = client().search_model_versions(f"name = '{name}' and tags.{tag} = '{value}'")
    for version in sorted(found, key=lambda version: int(version.version)):
        if tag == LOGGED or _is_whole(version):
            return VersionName(name, str(version.version))
    return None


def _is_whole(version: ModelVersion) -> bool:
    """Whether the logged model that a version points to still has its files as they were logged."""
    model_id = model_id_of(version)
    return model_id is not None and trouble(model_id) is None


def damage(version: VersionName) -> str | None:
    """What is wrong with the files of a version, if anything is; None where nothing is known."""
    model_id = logged_model_id(version)
    return trouble(model_id) if model_id else None


def advance_alias(version: VersionName, alias: str) -> str | None:
    """Point an alias at a version, unless it points to a later one.

    Returns:
        The later version that it stays with, or None.
    """
    now = alias_of(version.name, alias)
    if now is not None and int(now) > int(version.version):
        return now
    set_alias(version, alias)
    return None


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
        if is_missing(error):
            return None
        raise


def exists(version: VersionName) -> bool:
    """Whether the registry has a version."""
    from mlflow.exceptions import MlflowException

    try:
        client().get_model_version(version.name, version.version)
    except MlflowException as error:
        if is_missing(error):
            return False
        raise
    return True


def describe(version: VersionName) -> ModelVersion:
    """What the registry knows of a version."""
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


def describe_model(name: str, text: str) -> None:
    """Set a registered model's description, unless it has one."""
    if not client().get_registered_model(name).description:
        client().update_registered_model(name, description=text)


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
                f"{CHALLENGER}.\nRun  {run_command('register')}  first, or name a version: "
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
        if not is_missing(error):
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
    return model_id_of(describe(version))


def same_content(one: VersionName, other: VersionName) -> bool:
    """Whether two versions are the same model, registered twice."""
    return bool(content(one)) and content(one) == content(other)


def was_fine_tuned(version: VersionName) -> bool:
    """Whether a version was trained further, as its tags say."""
    return "adapter_sha256" in describe(version).tags


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


def is_missing(error: Any) -> bool:
    """Whether MLflow's error says that the version, the model or the alias does not exist."""
    missing: Literal["RESOURCE_DOES_NOT_EXIST"] = "RESOURCE_DOES_NOT_EXIST"
    no_alias = "alias" in str(error) and "not found" in str(error)
    return bool(error.error_code == missing or no_alias)
