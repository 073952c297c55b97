"""`models:/`, `runs:/` and artifact stores: a checkpoint that MLflow already holds.

Either the artifact directory is the checkpoint, or it is a logged model of the transformers flavor,
whose weights lie in `model/` and whose tokenizer may lie in `components/tokenizer/`.

Artifact stores state sizes and no digests, so a lock in the profile is the only thing that pins the
content; sizes are checked in any case. Retries are those of MLflow and the store's own client.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_mlflow.checkpoints import layout
from phi3_mlflow.core.errors import CheckpointRefused, EnvironmentProblem, UserError
from phi3_mlflow.sources.common import FetchedSource, Job, require_room
from phi3_mlflow.sources.local import take_directory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlflow.store.artifact.artifact_repo import ArtifactRepository

    from phi3_mlflow.sources.spec import MlflowSource

_MOST_FILES = 10_000
_DEEPEST = 8
_ADAPTER = "peft/adapter_config.json"  # where MLflow keeps one
_TOKENIZER_FOLDER = "components/tokenizer"
_PACKAGES = {"boto3": "boto3", "botocore": "boto3", "google": "google-cloud-storage"}


def fetch_mlflow(spec: MlflowSource, job: Job) -> FetchedSource:
    """Download what a checkpoint needs out of an artifact directory; see `fetch_source`."""
    uri = _fixed_uri(spec)
    with _reported(spec), tempfile.TemporaryDirectory(prefix="mlflow-", dir=job.downloads) as place:
        repository = _repository(uri)
        sizes = _walk(repository, job, spec)
        wanted = _wanted(sizes, repository, Path(place), spec)
        total = sum(sizes[path] for path in wanted)
        require_room(job.downloads, total, spec.text)
        gathered = Path(place) / "checkpoint"
        gathered.mkdir()
        with job.progress(f"downloading {spec.text}", total) as bar:
            for path in wanted:
                job.deadline.check(spec.text)
                got = _download(repository, path, Path(place), gathered)
                if got.stat().st_size != sizes[path]:
                    raise EnvironmentProblem(
                        f"{spec.text}: {path} is not what was listed: size expected "
                        f"{sizes[path]}, found {got.stat().st_size}"
                    )
                bar.advance(sizes[path])
                job.bytes_downloaded += sizes[path]
        files = take_directory(gathered, spec.text, job)
    return FetchedSource(
        source=spec.text,
        revision=_identity(uri, sizes),
        files=files,
        bytes_downloaded=job.bytes_downloaded,
        lock={name: digest.sha256 for name, digest in files.items()},
    )


def resolve_mlflow(spec: MlflowSource) -> str:
    """The version or run, and a digest of the names and sizes of its files."""
    uri = _fixed_uri(spec)
    with _reported(spec):
        return _identity(uri, _walk(_repository(uri), None, spec))


def _identity(uri: str, sizes: dict[str, int]) -> str:
    # What is signed about a model lies beside its files, and comes after them.
    files = sorted(item for item in sizes.items() if not item[0].startswith("attestations/"))
    listing = "".join(f"{size} {path}\n" for path, size in files)
    return f"{uri}#{hashlib.sha256(listing.encode()).hexdigest()[:16]}"


def _fixed_uri(spec: MlflowSource) -> str:
    """An alias as the version it stands for now; everything else as it is."""
    match = re.fullmatch(r"models:/([^@]+)@(.+)", spec.uri)
    if not match:
        return spec.uri
    with _reported(spec):
        from mlflow import MlflowClient

        version = MlflowClient().get_model_version_by_alias(match[1], match[2])
        return f"models:/{match[1]}/{version.version}"


def _repository(uri: str) -> ArtifactRepository:
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    return get_artifact_repository(uri)


def _walk(repository: ArtifactRepository, job: Job | None, spec: MlflowSource) -> dict[str, int]:
    """The size of every file below the artifact directory, by path."""
    sizes: dict[str, int] = {}
    folders: list[Any] = [None]
    while folders:
        if job:
            job.deadline.check(spec.text)
        for entry in repository.list_artifacts(folders.pop()):
            parts = entry.path.split("/")
            if ".." in parts or entry.path.startswith("/") or "\\" in entry.path:
                raise CheckpointRefused(
                    f"{spec.text} lists a file name that leaves its place: {entry.path!r}"
                )
            if not entry.is_dir:
                sizes[entry.path] = int(entry.file_size or 0)
            elif len(parts) < _DEEPEST:
                folders.append(entry.path)
        if len(sizes) > _MOST_FILES:
            raise UserError(f"{spec.text} holds more than {_MOST_FILES} files: no checkpoint does")
    if not sizes:
        raise UserError(f"{spec.text}: there are no files")
    return sizes


def _wanted(
    sizes: dict[str, int], repository: ArtifactRepository, place: Path, spec: MlflowSource
) -> list[str]:
    """The paths of the files to download."""
    folder = _checkpoint_folder(list(sizes), spec)
    if folder.removesuffix("model/") + _ADAPTER in sizes:
        raise CheckpointRefused(
            f"{spec.text} is a checkpoint with an adapter beside it, and the checkpoint alone is "
            "the model before it was trained. Log it merged (train.log_as: merged) and take that."
        )
    names = _names_in(folder, list(sizes))
    small = layout.small_files(names)
    for name in small:
        if sizes[folder + name] > layout.LARGEST_SMALL_FILE:
            raise CheckpointRefused(
                f"{spec.text}: {name} is larger than {layout.LARGEST_SMALL_FILE} bytes"
            )
    index = None
    if layout.INDEX in small:
        index = _download(repository, folder + layout.INDEX, place, place).read_bytes()
    paths = [folder + name for name in [*small, *layout.weight_files(names, index)]]
    if "tokenizer.json" not in small:
        # The transformers flavor stores the components of a pipeline apart.
        beside = folder.removesuffix("model/") + _TOKENIZER_FOLDER + "/"
        paths += [
            beside + name
            for name in layout.small_files(_names_in(beside, list(sizes)))
            if name not in small
        ]
    return paths


def _checkpoint_folder(paths: list[str], spec: MlflowSource) -> str:
    """Where in the artifacts the checkpoint lies: `""`, or a folder with a closing slash."""
    folders = [path.removesuffix(layout.CONFIG) for path in paths if _is_config(path)]
    with_weights = [
        folder
        for folder in folders
        if any(name.endswith(".safetensors") for name in _names_in(folder, paths))
    ]
    if len(with_weights) == 1:
        return with_weights[0]
    if with_weights:
        raise UserError(
            f"{spec.text} holds several checkpoints: name one of them: "
            + ", ".join(f"{spec.text}/{folder.rstrip('/')}" for folder in sorted(with_weights))
        )
    if folders:
        layout.weight_files(_names_in(min(folders, key=len), paths), None)
    raise CheckpointRefused(f"{spec.text} holds no checkpoint: no {layout.CONFIG} with weights")


def _is_config(path: str) -> bool:
    return path == layout.CONFIG or path.endswith("/" + layout.CONFIG)


def _names_in(folder: str, paths: list[str]) -> list[str]:
    """The names of the files that lie directly in a folder."""
    rests = [path.removeprefix(folder) for path in paths if path.startswith(folder)]
    return [rest for rest in rests if "/" not in rest]


def _download(repository: ArtifactRepository, path: str, place: Path, target: Path) -> Path:
    """Bring one file, under its own name, into `target`."""
    landing = place / "landing"
    landing.mkdir(exist_ok=True)
    came = repository.download_artifacts(path, dst_path=str(landing))  # type: ignore[no-untyped-call, unused-ignore]
    got = Path(came)
    if got.is_symlink() or not got.is_file():
        raise CheckpointRefused(f"{path} is a link or not a regular file")
    result = target / got.name
    if got.resolve().is_relative_to(place.resolve()):
        got.replace(result)
    else:
        # Some stores answer with their own file; it stays where it is.
        shutil.copyfile(got, result)
    return result


@contextlib.contextmanager
def _reported(spec: MlflowSource) -> Iterator[None]:
    """Whatever MLflow or a store's client raises, as a message; without MLflow's own bars."""
    from mlflow.exceptions import MlflowException

    name = "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    except (UserError, EnvironmentProblem, OSError):
        raise
    except ImportError as error:
        package = _PACKAGES.get((error.name or "").split(".")[0], error.name)
        raise EnvironmentProblem(
            f"{spec.text} needs a package that is not installed: pip install {package}"
        ) from error
    except MlflowException as error:
        theirs = error.error_code in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "IO_ERROR")
        kind = EnvironmentProblem if theirs else UserError
        raise kind(f"{spec.text}: MLflow says: {_first_line(error)}") from error
    except Exception as error:
        # The clients of artifact stores raise whatever they like.
        raise EnvironmentProblem(
            f"{spec.text}: {type(error).__name__}: {_first_line(error)}"
        ) from error
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _first_line(error: Exception) -> str:
    text = (str(error).strip().splitlines() or ["no message"])[0][:400]
    return re.sub(r"//[^/@\s]*@", "//***@", text)
