"""`hf:`: a repository on the Hugging Face Hub.

huggingface_hub says where things are (endpoint, addresses), who asks (token), whether the network
may be used, and reads the listing (`ModelInfo`). The requests themselves are `transfer.py`'s, so
that a listing too is fetched under the time limit and with back-off.

The listing states for every file its size, and its sha256 (files in LFS: the weights) or its git
blob id (all others). Both are checked against what arrives, as is the profile's lock.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from phi3_mlflow.checkpoints import layout
from phi3_mlflow.checkpoints.remote_code import CONFIGURATIONS, refuse_remote_code
from phi3_mlflow.core.errors import CheckpointRefused, EnvironmentProblem, UserError
from phi3_mlflow.sources.common import (
    FetchedSource,
    Job,
    check_lock_names,
    require_room,
)
from phi3_mlflow.sources.hub_access import endpoint, hub_transfer, offline
from phi3_mlflow.sources.hub_listing import (
    Listing,
    listing_file,
    read_listing,
    save_listing,
    saved_listing,
)
from phi3_mlflow.sources.partial import PartialFile, WholeFile

if TYPE_CHECKING:
    from collections.abc import Iterable

    import httpx

    from phi3_mlflow.core.progress import Meter
    from phi3_mlflow.sources.digests import Expected
    from phi3_mlflow.sources.retrying import Deadline, RetryPolicy
    from phi3_mlflow.sources.spec import HubSource
    from phi3_mlflow.sources.transfer import Transfer

_WEIGHTS = re.compile(r"model[\w.-]*\.safetensors")


def fetch_hub(spec: HubSource, job: Job) -> FetchedSource:
    """Fetch what a checkpoint needs from the hub; see `fetch_source`."""
    if offline():
        listing, files = _without_network(spec, job)
        return _assemble(spec, listing, files, job)
    with hub_transfer(spec, job.policy, job.deadline) as transfer:
        listing = read_listing(spec, transfer)
        save_listing(listing, job.downloads)
        small = layout.small_files(listing.files)
        if layout.CONFIG not in small:
            raise CheckpointRefused(f"{spec.text} has no {layout.CONFIG}")
        files = _bring(spec, listing, small, transfer, job, "configuration and tokenizer")
        # Whatever can be refused by the small files is refused before gigabytes come.
        if not job.drop_remote_code:
            _refuse_remote_code(files)
        weights, small = _weights(listing, small, files)
        check_lock_names(job.lock, [*small, *weights], spec.text)
        files |= _bring(spec, listing, weights, transfer, job, "weights")
    return _assemble(spec, listing, files, job)


def _weights(
    listing: Listing, small: list[str], files: dict[str, WholeFile]
) -> tuple[list[str], list[str]]:
    """The weights to take, and the small files that go with them; the others leave `files`."""
    index = _content(files, layout.INDEX)
    weights = layout.weight_files(listing.files, index)
    kept = layout.without_stale_index(small, weights, index)
    for name in set(small) - set(kept):
        files.pop(name, None)
    return weights, kept


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
    bar: Meter,
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
    listing_file(job.downloads, listing.commit).unlink(missing_ok=True)
    digests = {name: file.digest for name, file in sorted(files.items())}
    return FetchedSource(
        source=spec.text,
        revision=listing.commit,
        files=digests,
        bytes_downloaded=job.bytes_downloaded,
        lock={name: digest.sha256 for name, digest in digests.items()},
    )


def _without_network(spec: HubSource, job: Job) -> tuple[Listing, dict[str, WholeFile]]:
    """What earlier attempts brought, when it is all there."""
    if not spec.pinned:
        resolve_hub(spec, job.policy, job.deadline)  # raises: it cannot be asked offline
    listing = saved_listing(spec, job.downloads)
    wanted = layout.small_files(listing.files)
    files = _already_whole(wanted, listing, job)
    weights, wanted = _weights(listing, wanted, files)
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
