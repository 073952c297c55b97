"""Checking a version, or a folder with one: files, signature, provenance, verdict, registry.

Nothing of the model is loaded: files are hashed, and JSON and YAML are read. What a check finds is
a `Check`; the first that failed is the reason that a refusal gives.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from phi3_mlflow.artifacts.manifests import MANIFEST_NAME, FileEntry, Manifest
from phi3_mlflow.artifacts.provenance import PROVENANCE_NAME
from phi3_mlflow.core.errors import UserError
from phi3_mlflow.tracking import registry
from phi3_mlflow.tracking.registry import VersionName
from phi3_mlflow.tracking.stored_files import DIGEST, recorded
from phi3_mlflow.trust import provenance as statements
from phi3_mlflow.trust.attestations import (
    PROVENANCE,
    SIGNATURE,
    VERDICT,
    place_of,
    recipe_in,
)
from phi3_mlflow.trust.bundles import MODEL, Opened, Refused, open_bundle, signed_hashes
from phi3_mlflow.trust.files import ATTESTATIONS, ModelFiles

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from phi3_mlflow.trust.keys import Trusted

State = Literal["ok", "failed", "not checked"]
UNSIGNED = "it is not signed"
_TOLD = 3
_WEIGHTS = ("artifacts/onnx", "model")  # where the artifact of a recipe lies in a logged model


@dataclass(frozen=True)
class Check:
    """One check and what came of it.

    Attributes:
        name: files, signature, provenance, verdict, registry, recipe, age or rebuild.
        state: whether it went well.
        told: what was found, in a sentence.
        details: one line per file or tag that differs.
    """

    name: str
    state: State
    told: str
    details: tuple[str, ...] = ()

    @property
    def failed(self) -> bool:
        """Whether it speaks against the version."""
        return self.state == "failed"


@dataclass(frozen=True)
class Subject:
    """What is checked.

    Attributes:
        shown: what to call it.
        folder: with its files, on this machine.
        version: None for a folder, or a model that is not registered.
        tags: that the registry has of the version.
        digest: of the manifest, as MLflow's tag of the logged model has it.
    """

    shown: str
    folder: Path
    version: VersionName | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    digest: str | None = None


@dataclass(frozen=True)
class Demands:
    """What has to be so.

    Attributes:
        trusted: whose signatures count.
        signature: an unsigned version fails.
        verdict: so does one without a signed verdict.
        oldest: so does an earlier version.
    """

    trusted: Trusted
    signature: bool = False
    verdict: bool = False
    oldest: int | None = None


def subject_of(version: VersionName, folder: Path) -> Subject:
    """A registered version as something to check.

    Args:
        version: which one.
        folder: its files, as they were got for it.
    """
    known = registry.describe(version)
    return Subject(version.uri, folder, version, dict(known.tags), _recorded_digest(version))


def _recorded_digest(version: VersionName) -> str | None:
    from mlflow.exceptions import MlflowException

    model_id = registry.logged_model_id(version)
    try:
        model: Any = registry.client().get_logged_model(model_id) if model_id else None
    except MlflowException:
        return None
    return model.tags.get(DIGEST) if model is not None else None


def verify(subject: Subject, demands: Demands) -> list[Check]:
    """Check everything that can be checked without making the model again."""
    files = ModelFiles.read(subject.folder)
    checks = [_files(subject, files), *_signed(subject, files, demands), _recipe(subject, files)]
    if demands.oldest is not None:
        checks.append(_age(subject, demands.oldest))
    return [check for check in checks if check is not None]


def _files(subject: Subject, files: ModelFiles) -> Check:
    """The files against the manifest that was written down when the model was logged."""
    if "MLmodel" not in files.hashes:
        return Check("files", "failed", f"{subject.folder} is no model: it has no file MLmodel")
    try:
        manifest = recorded(subject.folder)
    except (UserError, RecursionError) as error:
        return Check("files", "failed", f"{MANIFEST_NAME} cannot be read: {error}")
    if not _plain(manifest.files):
        return Check("files", "failed", f"{MANIFEST_NAME} cannot be read: it lists no files")
    if subject.digest is not None and manifest.digest != subject.digest:
        told = f"{MANIFEST_NAME} is not the one that was logged, by MLflow's tag {DIGEST}"
        return Check("files", "failed", told)
    if not manifest.files:
        return Check("files", "not checked", "nothing was written down when it was logged")
    expected = {entry.path: entry.sha256 for entry in manifest.files}
    complete = MANIFEST_NAME in files.hashes  # older models list a part of their files
    own = {MANIFEST_NAME: files.hashes[MANIFEST_NAME]} if complete else {}
    among = files if complete else _only(files, expected)
    if problems := among.differences({**expected, **own}):
        return Check("files", "failed", _told(problems), tuple(problems))
    return Check("files", "ok", f"{len(expected)} files are those that were logged")


def _plain(entries: Sequence[FileEntry]) -> bool:
    """Whether entries are what they say: a stranger may have written them."""
    return all(isinstance(one.path, str) and isinstance(one.sha256, str) for one in entries)


def _only(files: ModelFiles, paths: Mapping[str, str]) -> ModelFiles:
    return ModelFiles({p: h for p, h in files.hashes.items() if p in paths}, odd=files.odd)


def _signed(subject: Subject, files: ModelFiles, demands: Demands) -> list[Check]:
    """Signature, provenance, verdict and what they say of the registry."""
    folders = _bundles(subject)
    if not folders:
        state: State = "failed" if demands.signature else "not checked"
        return [Check("signature", state, _unsigned(subject))]
    tried = {folder: _signature(folder / SIGNATURE, files, demands) for folder in folders}
    folder = next((each for each, check in tried.items() if check.state == "ok"), folders[0])
    checks = [tried[folder]]
    found, made = _statement(folder / PROVENANCE, demands, statements.SLSA, "provenance")
    if made is None or found.failed:
        return [*checks, found]
    checks += _provenance(subject, files, made)
    verdict = _verdict(subject, folder / VERDICT, files, demands)
    return [*checks, *([verdict] if verdict else [])]


def _bundles(subject: Subject) -> list[Path]:
    """The folders with bundles: the version's own; of what is no version, all that there are."""
    if subject.version is None:
        return _others(subject)
    own = subject.folder / place_of(subject.version)
    return [own] if own.is_dir() else []


def _others(subject: Subject) -> list[Path]:
    place = subject.folder / ATTESTATIONS
    return sorted(each for each in place.glob("*") if (each / SIGNATURE).is_file())


def _unsigned(subject: Subject) -> str:
    others = ", ".join(each.name for each in _others(subject))
    if others:
        return f"it is not signed as {subject.shown}; the same files are signed as {others}"
    return UNSIGNED


def _statement(
    file: Path, demands: Demands, predicate_type: str, name: str
) -> tuple[Check, Opened | None]:
    """Open a bundle: whether its signature is right, and by whom it is."""
    if not file.is_file():
        state: State = "failed" if demands.signature else "not checked"
        return Check(name, state, f"there is none: {file.name} is missing"), None
    if not demands.trusted:
        told = "no key was given to check it with: -P keys=FILE, or trust.keys in the profile"
        return Check(name, "failed" if demands.signature else "not checked", told), None
    try:
        opened = open_bundle(file, demands.trusted, predicate_type)
    except Refused as error:
        return Check(name, "failed", str(error)), None
    return Check(name, "ok", f"by {opened.shown}"), opened


def _signature(file: Path, files: ModelFiles, demands: Demands) -> Check:
    check, opened = _statement(file, demands, MODEL, "signature")
    if opened is None:
        return check
    try:
        problems = files.differences(signed_hashes(opened))
    except Refused as error:
        return Check("signature", "failed", str(error))
    if problems:
        told = f"the files are not those that were signed: {_told(problems)}"
        return Check("signature", "failed", told, tuple(problems))
    return Check("signature", "ok", f"{len(files.hashes)} files, signed by {opened.shown}")


def _provenance(subject: Subject, files: ModelFiles, made: Opened) -> list[Check]:
    """The files and the registry against what was signed when the version was registered."""
    try:
        signed = {one["name"]: one["digest"]["sha256"] for one in made.statement["subject"]}
        registered = made.statement["predicate"][statements.REGISTERED]
        name, number = str(registered["name"]), str(registered["version"])
        tags = {str(key): str(value) for key, value in registered["tags"].items()}
    except (KeyError, TypeError, AttributeError):
        return [Check("provenance", "failed", "the statement cannot be read")]
    if problems := files.differences(signed):
        told = f"it is about other files: {_told(problems)}"
        return [Check("provenance", "failed", told, tuple(problems))]
    signed_as = VersionName(name, number)
    if subject.version not in (None, signed_as):
        told = f"it was signed as {signed_as.uri}, and is offered as {subject.shown}"
        return [Check("provenance", "failed", told)]
    commit, dash, changes = tags.get("git_commit", "unknown").partition("-")
    told = f"{signed_as.uri}, made from {tags.get('source', 'unknown')} at commit "
    told += f"{commit[:12]}{dash}{changes}, signed by {made.shown}"
    checks = [Check("provenance", "ok", told)]
    if subject.version is not None:
        checks.append(_registry(tags, statements.named_tags(subject.tags)))
    return checks


def _registry(signed: Mapping[str, str], now: Mapping[str, str]) -> Check:
    problems = [
        f"{key} is {now.get(key, 'gone')!r}, {signed.get(key, 'nothing')!r} was signed"
        for key in sorted(signed.keys() | now.keys())
        if signed.get(key) != now.get(key)
    ]
    if problems:
        told = f"tags were changed after it was signed: {_told(problems)}"
        return Check("registry", "failed", told, tuple(problems))
    return Check("registry", "ok", f"{len(signed)} tags are those that were signed")


def _verdict(subject: Subject, file: Path, files: ModelFiles, demands: Demands) -> Check | None:
    """What the gate said: as it was signed, and as the registry has it."""
    now = statements.verdict_tags(subject.tags)
    if not file.is_file():
        if demands.verdict:
            return Check("verdict", "failed", "no verdict on it is signed: run evaluate")
        told = "the registry has a verdict that is not signed" if now else None
        return Check("verdict", "not checked", told) if told else None
    check, opened = _statement(file, demands, statements.TEST_RESULT, "verdict")
    if opened is None:
        return check
    try:
        root = opened.statement["subject"][0]["digest"]["sha256"]
        registered = opened.statement["predicate"][statements.REGISTERED]
        named = VersionName(str(registered["name"]), str(registered["version"]))
        tags = {str(key): str(value) for key, value in registered["tags"].items()}
    except (KeyError, TypeError, IndexError, AttributeError):
        return Check("verdict", "failed", "the statement cannot be read")
    if root != files.root:
        return Check("verdict", "failed", f"it is about other files than these: {named.uri}")
    if subject.version not in (None, named):
        return Check("verdict", "failed", f"it is about {named.uri}")
    if subject.version is not None and (problems := _changed(tags, now)):
        told = f"the registry has another one than was signed: {_told(problems)}"
        return Check("verdict", "failed", told, tuple(problems))
    said = f"{tags.get('gate', 'unknown')}, {tags.get('gate_decision', 'promote')}"
    return Check("verdict", "ok", f"{said}, signed by {opened.shown}")


def _changed(signed: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    keys = sorted(key for key in signed.keys() | now.keys() if signed.get(key) != now.get(key))
    return [f"{key} is {now.get(key, 'gone')!r}, {signed.get(key, 'nothing')!r} was signed"
            for key in keys]  # fmt: skip


def _recipe(subject: Subject, files: ModelFiles) -> Check | None:
    """The weights and what lies beside them, against the recipe in the model and the tags."""
    recipe = recipe_in(subject.folder)
    if recipe is None:
        return Check("recipe", "not checked", "the model carries no recipe")
    try:
        entries = tuple(FileEntry(f["path"], f["size"], f["sha256"]) for f in recipe["files"])
    except (KeyError, TypeError):
        return Check("recipe", "failed", "the recipe in the file MLmodel cannot be read")
    if not _plain(entries):
        return Check("recipe", "failed", "the recipe in the file MLmodel cannot be read")
    expected = {entry.path: entry.sha256 for entry in entries}
    digest = Manifest(entries).digest
    registered = subject.tags.get("artifact_sha256", digest)
    if registered != digest:
        told = f"tag artifact_sha256 is {registered}, the recipe's files make {digest}"
        return Check("recipe", "failed", told)
    if subject.tags.get("logged_as") == "adapter":
        return Check("recipe", "not checked", "it is logged as a checkpoint and an adapter")
    inside = _artifact(files)
    if problems := [
        f"{path} {'is missing' if path not in inside else 'has other bytes'}"
        for path, sha256 in expected.items()
        if inside.get(path) != sha256
    ]:
        told = f"the model is not what its recipe says: {_told(problems)}"
        return Check("recipe", "failed", told, tuple(problems))
    return Check("recipe", "ok", f"{len(expected)} files, artifact_sha256 {digest[:12]}...")


def _artifact(files: ModelFiles) -> dict[str, str]:
    """The files of the artifact that was logged, by their paths in it."""
    for place in _WEIGHTS:
        found = {
            path.removeprefix(f"{place}/"): sha256
            for path, sha256 in files.hashes.items()
            if path.startswith(f"{place}/")
        }
        if found:
            return {p: h for p, h in found.items() if p not in (PROVENANCE_NAME, MANIFEST_NAME)}
    return {}


def _age(subject: Subject, oldest: int) -> Check:
    if subject.version is None:
        return Check("age", "not checked", "a folder has no version number of its own")
    if int(subject.version.version) < oldest:
        told = f"version {subject.version.version} is older than trust.oldest_version {oldest}"
        return Check("age", "failed", told)
    return Check("age", "ok", f"not older than version {oldest}")


def _told(problems: list[str]) -> str:
    more = len(problems) - _TOLD
    return "; ".join(problems[:_TOLD]) + (f"; and {more} more" if more > 0 else "")
