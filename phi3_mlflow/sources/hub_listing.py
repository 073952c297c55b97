"""What the hub states of a commit: every file with its size and digest.

API: https://huggingface.co/docs/hub/api
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from phi3_mlflow.core.errors import CheckpointRefused, EnvironmentProblem
from phi3_mlflow.sources.digests import Expected
from phi3_mlflow.sources.hub_access import endpoint

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from phi3_mlflow.sources.spec import HubSource
    from phi3_mlflow.sources.transfer import Transfer

_LARGEST_LISTING = 50_000_000  # bytes
_LARGEST_FILE = 1 << 40  # bytes
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Listing:
    """What the hub states of one commit: every file with its size and digest."""

    commit: str
    files: dict[str, Expected]


def read_listing(spec: HubSource, transfer: Transfer) -> Listing:
    """Ask the hub what a revision holds.

    Raises:
        EnvironmentProblem: the answer cannot be had or not be read.
        CheckpointRefused: it holds names that leave the directory.
    """
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


def _parse_listing(payload: Mapping[str, Any]) -> Listing:
    from huggingface_hub import ModelInfo

    info = ModelInfo(**payload)  # type: ignore[no-untyped-call, unused-ignore]
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


def listing_file(downloads: Path, commit: str) -> Path:
    """Where the listing of a commit is kept."""
    return downloads / f"listing-{commit}.json"


def save_listing(listing: Listing, downloads: Path) -> None:
    """Keep the listing with the partial downloads, so that whole ones can be used offline."""
    text = json.dumps({name: list(expected) for name, expected in listing.files.items()})
    partial = listing_file(downloads, listing.commit).with_suffix(".tmp")
    partial.write_text(text, "utf-8")
    partial.replace(listing_file(downloads, listing.commit))


def saved_listing(spec: HubSource, downloads: Path) -> Listing:
    """The listing that an earlier fetch of a pinned source kept.

    Raises:
        EnvironmentProblem: there is none.
    """
    try:
        content = json.loads(listing_file(downloads, spec.revision).read_text("utf-8"))
        files = {name: Expected(*values) for name, values in content.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        raise EnvironmentProblem(
            f"{spec.text} is not in the cache, and HF_HUB_OFFLINE forbids to download it. "
            "Run once without HF_HUB_OFFLINE."
        ) from None
    return Listing(spec.revision, files)
