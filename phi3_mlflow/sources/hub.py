"""`hf:`: a repository on the Hugging Face Hub.

huggingface_hub says where things are (endpoint, addresses), who asks (token), whether the network
may be used, and reads the listing (`ModelInfo`). The requests themselves are `transfer.py`'s, so
that a listing too is fetched under the time limit and with back-off.

The listing states for every file its size, and its sha256 (files in LFS: the weights) or its git
blob id (all others). Both are checked against what arrives, as is the profile's lock.
API: https://huggingface.co/docs/hub/api
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from phi3_mlflow.checkpoints import layout
from phi3_mlflow.checkpoints.remote_code import CONFIGURATIONS, refuse_remote_code
from phi3_mlflow.core.errors import CheckpointRefused, EnvironmentProblem, ProjectError, UserError
from phi3_mlflow.sources.common import (
    FetchedSource,
    Job,
    Progress,
    check_lock_names,
    environment_flag,
    require_room,
)
from phi3_mlflow.sources.digests import Expected
from phi3_mlflow.sources.partial import PartialFile, WholeFile
from phi3_mlflow.sources.spec import HubSource
from phi3_mlflow.sources.transfer import Deadline, RetryPolicy, Transfer

if TYPE_CHECKING:
    import httpx

_LARGEST_LISTING = 50_000_000  # bytes
_LARGEST_FILE = 1 << 40
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_WEIGHTS = re.compile(r"model[\w.-]*\.safetensors")
_PRINTABLE = re.compile(r"[\x21-\x7e]+")


@dataclass(frozen=True)
class Listing:
    """What the hub states of one commit: every file with its size and digest."""

    commit: str
    files: dict[str, Expected]


def fetch_hub(spec: HubSource, job: Job) -> FetchedSource:
    """Fetch what a checkpoint needs from the hub; see `fetch_source`."""
    if offline():
        listing, files = _without_network(spec, job)
        return _assemble(spec, listing, files, job)
    with hub_transfer(spec, job.policy, job.deadline) as transfer:
        listing = read_listing(spec, transfer)
        _save_listing(listing, job.downloads)
        small = layout.small_files(listing.files)
        if layout.CONFIG not in small:
            raise CheckpointRefused(f"{spec.text} has no {layout.CONFIG}")
        files = _bring(spec, listing, small, transfer, job, "configuration and tokenizer")
        # Whatever can be refused by the small files is refused before gigabytes come.
        if not job.drop_remote_code:
            _refuse_remote_code(files)
        weights = layout.weight_files(listing.files, _content(files, layout.INDEX))
        check_lock_names(job.lock, [*small, *weights], spec.text)
        files |= _bring(spec, listing, weights, transfer, job, "weights")
    return _assemble(spec, listing, files, job)


def _refuse_remote_code(files: dict[str, WholeFile]) -> None:
    refuse_remote_code(
        {
            name: layout.parse_json(files[name].path.read_bytes(), name)
            for name in CONFIGURATIONS
            if name in files
        }
    )


def resolve_hub(spec: HubSource, policy: RetryPolicy, deadline: Deadline) -> str:
    """The commit a revision stands for; asks the hub only when it is not one itself."""
    if spec.pinned:
        return spec.revision
    if offline():
        raise UserError(
            f"{spec.text}: what {spec.revision!r} stands for can only be asked online "
            "(HF_HUB_OFFLINE is set). Pin the commit: hf:OWNER/NAME@ and its 40 digits."
        )
    with hub_transfer(spec, policy, deadline) as transfer:
        return read_listing(spec, transfer).commit


def size_of_hub(spec: HubSource, policy: RetryPolicy, deadline: Deadline) -> int:
    """The bytes of the files that a fetch takes, by the listing.

    Without the index it is not known which shards it names: all in its folder are counted.
    """
    with hub_transfer(spec, policy, deadline) as transfer:
        listing = read_listing(spec, transfer)
    weights = [name for name in listing.files if _WEIGHTS.fullmatch(name)]
    if layout.SINGLE in weights:
        weights = [layout.SINGLE]
    names = [*layout.small_files(listing.files), *weights]
    return sum(listing.files[name].size or 0 for name in names)


def offline() -> bool:
    """Whether huggingface_hub's offline mode is on."""
    return environment_flag("HF_HUB_OFFLINE") or environment_flag("TRANSFORMERS_OFFLINE")


def token() -> str | None:
    """The user's hub token, from HF_TOKEN or where `hf auth login` left it.

    Raises:
        UserError: it cannot be sent; the message does not hold it.
    """
    from huggingface_hub import get_token

    if environment_flag("HF_HUB_DISABLE_IMPLICIT_TOKEN"):
        return None
    found = get_token()
    if found is not None and not _PRINTABLE.fullmatch(found):
        raise UserError(
            "the Hugging Face token (HF_TOKEN) holds spaces, line breaks or characters outside "
            "ASCII; set it again"
        )
    return found


def endpoint() -> str:
    """The hub's address: HF_ENDPOINT, or huggingface.co."""
    from huggingface_hub import constants

    address = os.environ.get("HF_ENDPOINT", "").rstrip("/") or constants.ENDPOINT
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        raise UserError("HF_ENDPOINT must be an address like https://huggingface.co")
    return address


def hub_transfer(spec: HubSource, policy: RetryPolicy, deadline: Deadline) -> Transfer:
    """Requests to the hub as this user."""
    from huggingface_hub.utils import build_hf_headers

    from phi3_mlflow import __version__

    address, secret = endpoint(), token()
    local = urlsplit(address).hostname in ("localhost", "127.0.0.1", "::1")
    if secret and not address.startswith("https://") and not local:
        raise UserError(
            "HF_ENDPOINT is not https: the Hugging Face token would be readable on the way. "
            "Use https, or unset HF_TOKEN."
        )
    headers = build_hf_headers(
        token=secret or False, library_name="phi3-mlflow", library_version=__version__
    )

    def refuse(what: str, response: httpx.Response) -> ProjectError:
        return _refusal(spec, what, response, bool(secret))

    return Transfer(address, headers, policy, deadline, refuse)


def read_listing(spec: HubSource, transfer: Transfer) -> Listing:
    """Ask the hub what a revision holds.

    Raises:
        EnvironmentProblem: the answer cannot be had or not be read.
        CheckpointRefused: it holds names that leave the directory.
    """
    from urllib.parse import quote

    url = f"{endpoint()}/api/models/{spec.repo}/revision/{quote(spec.revision, safe='')}?blobs=true"
    content = transfer.get(url, f"the listing of {spec.text}", _LARGEST_LISTING)
    try:
        payload = json.loads(content)
        if not isinstance(payload, dict):
            raise TypeError("no object")
        listing = _parse_listing(payload)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise EnvironmentProblem(
            f"the listing of {spec.text} is not what the hub answers: "
            f"{type(error).__name__} {str(error)[:200]}"
        ) from None
    if spec.pinned and listing.commit != spec.revision:
        raise EnvironmentProblem(
            f"the hub answers for {spec.text} with another commit: {listing.commit}"
        )
    for name in listing.files:
        if _leaves(name):
            raise CheckpointRefused(
                f"{spec.text} lists a file name that leaves its place: {name!r}"
            )
    return listing


def _parse_listing(payload: dict[str, Any]) -> Listing:
    from huggingface_hub import ModelInfo

    info = ModelInfo(**payload)
    if not isinstance(info.sha, str) or not _COMMIT.fullmatch(info.sha):
        raise ValueError("no commit")
    files: dict[str, Expected] = {}
    for sibling in info.siblings or []:
        name = sibling.rfilename
        if not isinstance(name, str) or name in files:
            raise ValueError(f"file name {name!r}")
        lfs = sibling.lfs
        expected = Expected(
            lfs.size if lfs else sibling.size,
            lfs.sha256 if lfs else None,
            None if lfs else sibling.blob_id,
        )
        if not isinstance(expected.size, int) or not 0 <= expected.size < _LARGEST_FILE:
            raise ValueError(f"size of {name!r}")
        pattern = _SHA256 if lfs else _COMMIT
        if not isinstance(expected.key, str) or not pattern.fullmatch(expected.key):
            raise ValueError(f"digest of {name!r}")
        files[name] = expected
    if not files:
        raise ValueError("no files")
    return Listing(info.sha, files)


def _leaves(name: str) -> bool:
    return (
        name.startswith(("/", "~"))
        or "\\" in name
        or ".." in name.split("/")
        or not name.isprintable()
    )


def _refusal(
    spec: HubSource, what: str, response: httpx.Response, with_token: bool
) -> ProjectError:
    """An answer that will not get better by asking again, as an error."""
    status, code = response.status_code, response.headers.get("X-Error-Code", "")
    page = f"{endpoint()}/{spec.repo}"
    if status in (401, 403) or code == "GatedRepo":
        how = (
            "The token was sent: its account must have accepted the conditions there, and the "
            "token must be allowed to read."
            if with_token
            else "Accept the conditions there if there are any, and set HF_TOKEN to a token that "
            "may read it."
        )
        return UserError(f"{what}: the hub does not give {page} to this user ({status}). {how}")
    if code == "RevisionNotFound":
        return UserError(f"{what}: {page} has no revision {spec.revision!r}")
    if code == "EntryNotFound":
        return EnvironmentProblem(f"{what}: listed, but not there ({status})")
    if status == 404:
        return UserError(f"{what}: {page} does not exist, or is private and needs HF_TOKEN (404)")
    if status in (410, 451) or code == "DisabledRepo":
        return UserError(f"{what}: {page} was taken down ({status})")
    return EnvironmentProblem(f"{what}: the hub answers {status}")


def _expected(name: str, listing: Listing, job: Job) -> Expected:
    """What a file must be by the listing and by the lock, which must agree."""
    stated, locked = listing.files[name], job.lock.get(name)
    if locked is None:
        return stated
    if stated.sha256 and stated.sha256 != locked:
        raise UserError(
            f"{name}: the profile's lock and the source differ: sha256 expected {locked}, the "
            f"source states {stated.sha256}. Nothing was downloaded of it."
        )
    return stated._replace(sha256=locked)


def _partial(name: str, listing: Listing, job: Job) -> PartialFile:
    key = listing.files[name].key
    return PartialFile(name, str(key), _expected(name, listing, job), job.downloads)


def _bring(
    spec: HubSource,
    listing: Listing,
    names: Iterable[str],
    transfer: Transfer,
    job: Job,
    description: str,
) -> dict[str, WholeFile]:
    """Have files whole and checked in the downloads directory."""
    wanted = [_partial(name, listing, job) for name in names]
    for file in wanted:
        if layout.is_small(file.name) and (file.expected.size or 0) > layout.LARGEST_SMALL_FILE:
            raise CheckpointRefused(
                f"{file.name} has {file.expected.size} bytes; no such file is larger than "
                f"{layout.LARGEST_SMALL_FILE}"
            )
    total = sum(file.expected.size or 0 for file in wanted)
    here = sum(file.standing() for file in wanted)
    require_room(job.downloads, max(0, total - here), f"{spec.text} ({description})")
    with job.progress(f"{spec.repo}: {description}", total) as bar:
        return {
            file.name: file.whole(bar) or _download(spec, listing, file, transfer, job, bar)
            for file in wanted
        }


def _download(
    spec: HubSource,
    listing: Listing,
    file: PartialFile,
    transfer: Transfer,
    job: Job,
    bar: Progress,
) -> WholeFile:
    """Bring one file, going on where an earlier attempt ended."""
    from huggingface_hub import hf_hub_url

    url = hf_hub_url(spec.repo, file.name, revision=listing.commit, endpoint=endpoint())

    def inspect(response: httpx.Response) -> None:
        _check_headers(file.name, listing.commit, listing.files[file.name], response)

    def advance(n: int) -> None:
        bar.advance(n)
        job.bytes_downloaded += max(n, 0)

    with file.open_part() as writer:
        bar.advance(writer.size)
        digest = transfer.download(url, writer, file.expected, file.name, advance, inspect)
    return file.finish(digest)


def _check_headers(name: str, commit: str, stated: Expected, response: httpx.Response) -> None:
    """Refuse an answer of the hub that speaks of another commit or another content."""
    if response.status_code >= 400:
        return
    served = response.headers.get("X-Repo-Commit")
    if served and served != commit:
        raise EnvironmentProblem(f"{name}: asked for commit {commit}, the hub serves {served}")
    etag = response.headers.get("X-Linked-Etag") or response.headers.get("ETag") or ""
    etag = etag.removeprefix("W/").strip('"')
    if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", etag) and etag != stated.key:
        raise EnvironmentProblem(
            f"{name} is not what was listed: digest expected {stated.key}, the hub serves {etag}"
        )


def _assemble(
    spec: HubSource, listing: Listing, files: dict[str, WholeFile], job: Job
) -> FetchedSource:
    """Move everything into the output, at the very end."""
    for name, file in files.items():
        file.move_to(job.out / name)
    _listing_file(job.downloads, listing.commit).unlink(missing_ok=True)
    digests = {name: file.digest for name, file in sorted(files.items())}
    return FetchedSource(
        source=spec.text,
        revision=listing.commit,
        files=digests,
        bytes_downloaded=job.bytes_downloaded,
        lock={name: digest.sha256 for name, digest in digests.items()},
    )


def _listing_file(downloads: Path, commit: str) -> Path:
    return downloads / f"listing-{commit}.json"


def _save_listing(listing: Listing, downloads: Path) -> None:
    """Keep the listing with the partial downloads, so that whole ones can be used offline."""
    text = json.dumps({name: list(expected) for name, expected in listing.files.items()})
    partial = _listing_file(downloads, listing.commit).with_suffix(".tmp")
    partial.write_text(text, "utf-8")
    partial.replace(_listing_file(downloads, listing.commit))


def _saved_listing(spec: HubSource, downloads: Path) -> Listing:
    if not spec.pinned:
        resolve_hub(spec, RetryPolicy(), Deadline(None, RetryPolicy()))
    try:
        content = json.loads(_listing_file(downloads, spec.revision).read_text("utf-8"))
        files = {name: Expected(*values) for name, values in content.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        raise EnvironmentProblem(
            f"{spec.text} is not in the cache, and HF_HUB_OFFLINE forbids to download it. "
            "Run once without HF_HUB_OFFLINE."
        ) from None
    return Listing(spec.revision, files)


def _without_network(spec: HubSource, job: Job) -> tuple[Listing, dict[str, WholeFile]]:
    """What earlier attempts brought, when it is all there."""
    listing = _saved_listing(spec, job.downloads)
    wanted = layout.small_files(listing.files)
    files = _already_whole(wanted, listing, job)
    weights = layout.weight_files(listing.files, _content(files, layout.INDEX))
    check_lock_names(job.lock, [*wanted, *weights], spec.text)
    return listing, files | _already_whole(weights, listing, job)


def _already_whole(names: list[str], listing: Listing, job: Job) -> dict[str, WholeFile]:
    files, missing = {}, []
    for name in names:
        with job.progress(name, listing.files[name].size) as bar:
            file = _partial(name, listing, job).whole(bar)
        if file is None:
            missing.append(name)
        else:
            files[name] = file
    if missing:
        raise EnvironmentProblem(
            f"{', '.join(missing)}: not in the cache or damaged there, and HF_HUB_OFFLINE forbids "
            "to download. Run once without HF_HUB_OFFLINE."
        )
    return files


def _content(files: dict[str, WholeFile], name: str) -> bytes | None:
    return files[name].path.read_bytes() if name in files else None
