"""Whether the files of a logged model are still those that were logged.

Beside its files a logged model has a manifest of them, and a tag with the manifest's digest. Two
questions are asked. Before a step says that there is nothing to do: has a file been touched since
it was last read (size, inode, times)? Only then are the bytes read. Before a model is loaded, or
when it is asked for: are all bytes what they were? A store that is no folder of this machine is
asked for its list of names and sizes in the first case; in the second, what was downloaded is read.

Models that were logged without a manifest of their own have that of the export or of the checkpoint
inside them, which covers the weights.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_mlflow.artifacts.cache import cache_root, key_of
from phi3_mlflow.artifacts.manifests import MANIFEST_NAME, FileEntry, Manifest, sha256_of_file
from phi3_mlflow.artifacts.stamps import stamp_of, write_json
from phi3_mlflow.core.errors import EnvironmentProblem, UserError
from phi3_mlflow.core.hints import run_command

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlflow.entities.model_registry import ModelVersion
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

LOGGED = "logged_model"
"""The tag of a version that says which logged model it is."""
DIGEST = "files_sha256"
"""The tag of a logged model that has the digest of its manifest."""
ADDED = "registered_model_meta"
"""What MLflow puts beside the files of a model each time that it is loaded."""
_MODEL_FILE = "MLmodel"
_INSIDE = ("artifacts/onnx", "model")  # where older models have a manifest
_UNKNOWN = "is no longer in MLflow"
_TOLD = 3
_URI = re.compile(r"models:/(?:(m-\w+)|([^/@]+)/([0-9]+)|([^/@]+)@([\w.-]+))")


def trouble(model_id: str, *, thorough: bool = False) -> str | None:
    """What is wrong with a logged model, if anything is.

    Args:
        model_id: MLflow's, `m-...`.
        thorough: read every byte, also of files that look untouched. Of a store that is no folder
            of this machine only names and sizes are compared in any case.

    Raises:
        EnvironmentProblem: the store does not answer.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        model = MlflowClient().get_logged_model(model_id)
    except MlflowException:
        return f"the logged model {model_id} {_UNKNOWN}"
    if str(model.status) != "READY":
        return f"the logged model {model_id} is {model.status}"
    repository = _repository(model.artifact_location)
    folder = folder_of(repository)
    if folder is None:
        problems = _listed_problems(repository, model.tags.get(DIGEST))
    else:
        problems = _problems(folder, model.tags.get(DIGEST), thorough=thorough, remember=True)
    if not problems:
        return None
    if problems[0].startswith(f"{_MODEL_FILE} is missing"):
        return f"the files of the logged model {model_id} are gone"
    return f"the logged model {model_id} is damaged: {_told(problems)}"


def whole_files(model_uri: str) -> Path:
    """A model's files on this machine, after all of their bytes were compared.

    Nothing is copied where the artifact store is a folder of this machine.

    Raises:
        UserError: there is no such model.
        EnvironmentProblem: it is damaged; the message names file and model, and what to do.
    """
    folder = local_files(model_uri)
    require_whole(folder, model_uri)
    return folder


def local_files(model_uri: str) -> Path:
    """A model's files on this machine, as they are.

    Raises:
        UserError: there is no such model.
        EnvironmentProblem: MLflow knows it, and its files are gone.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=model_uri))
    except (MlflowException, OSError) as error:
        if found := _why_refused(model_uri):
            raise EnvironmentProblem(_refused(model_uri, found)) from error
        told = str(getattr(error, "message", "") or error)[:300]
        raise UserError(f"{model_uri}: no such model: {told}") from error


def require_whole(folder: Path, model_uri: str) -> None:
    """Compare every byte of a model's files with what was recorded when it was logged.

    Args:
        folder: with the files: the artifact store's own, or a copy.
        model_uri: what to call it.

    Raises:
        EnvironmentProblem: it is damaged; the message names file and model, and what to do.
    """
    leave_no_bytecode()
    expected, stored = _known_of(model_uri, folder)
    if expected is None and not (folder / _MODEL_FILE).is_file():
        return  # no model at all, which whoever loads it says
    problems = _problems(folder, expected, thorough=True, remember=stored)
    if problems:
        why = f"its files are damaged: {_told(problems)}"
        raise EnvironmentProblem(f"{_refused(model_uri, why)}. The files are in {folder}")


@contextmanager
def temporary_downloads() -> Iterator[None]:
    """Let MLflow download into a folder that goes away: it leaves its copies in the system's.

    A model in a store on this machine is not copied, and stays where it is.
    """
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="phi3-mlflow-") as folder:
        tempfile.tempdir = folder
        try:
            yield
        finally:
            tempfile.tempdir = before


def leave_no_bytecode() -> None:
    """Keep Python from writing byte code, in this process and in those that it starts.

    A model that is loaded from a store on this machine would get folders `__pycache__`, which are
    no part of what was logged or signed.
    """
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"


def refuse_damaged(model_uri: str) -> None:
    """Refuse a model whose files look touched and are not what they were; quick, see `trouble`.

    Raises:
        EnvironmentProblem: it is damaged; the message names file and model, and what to do.
    """
    if found := _why_refused(model_uri):
        raise EnvironmentProblem(_refused(model_uri, found))


def _why_refused(model_uri: str) -> str | None:
    """What is wrong with a model that MLflow has; None also for the id of one that it never had."""
    model_id, _ = _model_of(model_uri)
    found = trouble(model_id) if model_id else None
    unknown = found is not None and found.endswith(_UNKNOWN)
    return None if unknown and model_uri == f"models:/{model_id}" else found


def recorded(folder: Path) -> Manifest:
    """What was written down of a model's files, by paths within its folder; empty where nothing.

    Raises:
        UserError: a manifest cannot be read.
    """
    if (folder / MANIFEST_NAME).is_file():
        return Manifest.read(folder)
    files: list[FileEntry] = []
    for place in _INSIDE:
        if (folder / place / MANIFEST_NAME).is_file():
            found = Manifest.read(folder / place).files
            files += [FileEntry(f"{place}/{f.path}", f.size, f.sha256) for f in found]
    return Manifest(tuple(files))


def folder_of(repository: ArtifactRepository) -> Path | None:
    """The folder of this machine that an artifact store is, if it is one."""
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    if isinstance(repository, LocalArtifactRepository):
        return Path(repository.artifact_dir)
    return None


def listed_sizes(repository: ArtifactRepository) -> dict[str, int | None]:
    """The size of every file in an artifact store by its path; None where it does not say.

    Raises:
        EnvironmentProblem: the store does not answer.
    """
    sizes: dict[str, int | None] = {}
    folders: list[str | None] = [None]
    while folders:
        for entry in _asked(repository, folders.pop()):
            if entry.is_dir:
                folders.append(entry.path)
            else:
                sizes[entry.path] = entry.file_size
    return sizes


def _repository(location: str) -> ArtifactRepository:
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    return get_artifact_repository(location)


def _asked(repository: ArtifactRepository, folder: str | None) -> list[Any]:
    try:
        return list(repository.list_artifacts(folder))
    except Exception as error:  # the clients of stores raise whatever they like
        raise EnvironmentProblem(
            f"the artifact store {_without_password(repository.artifact_uri)} cannot be read: "
            f"{str(error)[:300]}"
        ) from error


def _problems(folder: Path, expected: str | None, *, thorough: bool, remember: bool) -> list[str]:
    """What differs in a folder from what was recorded, a phrase per file.

    Args:
        folder: a model's files.
        expected: the digest of the manifest, where it is known.
        thorough: read files that look untouched, too.
        remember: write down how the files look after they were found right.
    """
    if not (folder / _MODEL_FILE).is_file():
        return [f"{_MODEL_FILE} is missing"]
    manifest, problems = _anchored(folder, expected)
    if problems:
        return problems
    state = cache_root() / "stored" / f"{key_of({'folder': str(folder.resolve())})}.json"
    looks = {"digest": manifest.digest, "files": _looks(folder, manifest)}
    if not thorough and _read(state) == looks:
        return []
    problems = list(_differences(folder, manifest))
    if remember:
        with suppress(OSError):  # on a full disk the model is none the worse
            if problems:
                state.unlink(missing_ok=True)
            else:
                state.parent.mkdir(parents=True, exist_ok=True)
                write_json(state, looks)
    return problems


def _anchored(folder: Path, expected: str | None) -> tuple[Manifest, list[str]]:
    """What was recorded, and what is wrong with that itself."""
    try:
        manifest = recorded(folder)
    except UserError:
        return Manifest(()), [f"{MANIFEST_NAME} cannot be read"]
    if expected and not (folder / MANIFEST_NAME).is_file():
        return manifest, [f"{MANIFEST_NAME} is missing"]
    if expected and manifest.digest != expected:
        return manifest, [f"{MANIFEST_NAME} is not the one that was logged"]
    return manifest, []


def _differences(folder: Path, manifest: Manifest) -> Iterator[str]:
    for entry in manifest.files:
        file = folder / entry.path
        try:
            size = file.stat().st_size
            if size != entry.size:
                yield f"{entry.path} has {size} bytes, {entry.size} were logged"
            elif sha256_of_file(file) != entry.sha256:
                yield f"{entry.path} has other bytes than were logged"
        except (FileNotFoundError, NotADirectoryError):
            yield f"{entry.path} is missing"
        except OSError as error:
            yield f"{entry.path} cannot be read: {error.strerror or error}"


def _listed_problems(repository: ArtifactRepository, expected: str | None) -> list[str]:
    """What a store's list of files says against a model."""
    sizes = listed_sizes(repository)
    if _MODEL_FILE not in sizes:
        return [f"{_MODEL_FILE} is missing"]
    places = [MANIFEST_NAME, *(f"{place}/{MANIFEST_NAME}" for place in _INSIDE)]
    with tempfile.TemporaryDirectory() as temporary:
        for name in filter(sizes.__contains__, places):
            with suppress(Exception):  # what cannot be had says nothing
                repository.download_artifacts(name, dst_path=temporary)  # type: ignore[no-untyped-call, unused-ignore]
        manifest, problems = _anchored(Path(temporary), expected)
    for entry in manifest.files:
        if entry.path not in sizes:
            problems.append(f"{entry.path} is missing")
        elif sizes[entry.path] not in (None, entry.size):
            problems.append(f"{entry.path} has {sizes[entry.path]} bytes, {entry.size} were logged")
    return problems


def _looks(folder: Path, manifest: Manifest) -> dict[str, list[int] | None]:
    """What changes when somebody touches a file; None for one that is not there."""
    looks: dict[str, list[int] | None] = {}
    for entry in manifest.files:
        try:
            looks[entry.path] = stamp_of(folder / entry.path)
        except OSError:
            looks[entry.path] = None
    return looks


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return None


def _known_of(model_uri: str, folder: Path) -> tuple[str | None, bool]:
    """The digest of a model's manifest by MLflow's tag, and whether a folder is the store's own."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    model_id, _ = _model_of(model_uri)
    try:
        if model_id is None:
            return None, False
        model = MlflowClient().get_logged_model(model_id)
        own = folder_of(_repository(model.artifact_location))
    except MlflowException:
        return None, False
    return model.tags.get(DIGEST), own is not None and own.resolve() == folder.resolve()


def _model_of(model_uri: str) -> tuple[str | None, str | None]:
    """The id of the logged model that a URI means, and the profile it was registered for."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    found = _URI.fullmatch(model_uri)
    if not found:
        return None, None
    model_id, name, number, aliased, alias = found.groups()
    if model_id:
        return model_id, None
    client = MlflowClient()
    try:
        if alias:
            version = client.get_model_version_by_alias(aliased, alias)
        else:
            version = client.get_model_version(name, number)
    except MlflowException:
        return None, None
    return model_id_of(version), version.tags.get("profile")


def model_id_of(version: ModelVersion) -> str | None:
    """The id of the logged model that a version is, `m-...`, where it is one."""
    named = (version.tags.get(LOGGED, ""), version.source or "")
    ids = [uri.removeprefix("models:/") for uri in named if uri.startswith("models:/m-")]
    return str(getattr(version, "model_id", None) or "") or next(iter(ids), None)


def _told(problems: list[str]) -> str:
    more = len(problems) - _TOLD
    return "; ".join(problems[:_TOLD]) + (f"; and {more} more" if more > 0 else "")


def _refused(model_uri: str, why: str) -> str:
    profile = _model_of(model_uri)[1]
    again = run_command(profile=profile) if profile else run_command()
    return (
        f"{model_uri} cannot be used: {why}.\n"
        f"Run  {again}  to log, register and promote the same model anew, or bring the file back "
        "from a copy"
    )


def _without_password(uri: str) -> str:
    return re.sub(r"//[^/@\s]*@", "//***@", uri)
