"""Where a checkpoint comes from, and how it gets here unharmed: see `fetch_source`."""

from __future__ import annotations

from phi3_mlflow.sources.common import FetchedSource, Progress, ProgressFactory
from phi3_mlflow.sources.digests import FileDigest
from phi3_mlflow.sources.fetch import (
    fetch_source,
    resolve_revision,
    size_of_source,
    write_lock,
)
from phi3_mlflow.sources.spec import SourceSpec, parse_source
from phi3_mlflow.sources.transfer import RetryPolicy

__all__ = [
    "FetchedSource",
    "FileDigest",
    "Progress",
    "ProgressFactory",
    "RetryPolicy",
    "SourceSpec",
    "fetch_source",
    "parse_source",
    "resolve_revision",
    "size_of_source",
    "write_lock",
]
