"""Where a file of rows is: on this machine, or wherever MLflow downloads from."""

from __future__ import annotations

import atexit
import re
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlparse, urlsplit, urlunsplit
from urllib.request import url2pathname

from phi3_mlflow.core.errors import UserError

DATASET = "mlflow-dataset:"
"""What a data set of MLflow's, of `mlflow.genai.datasets`, is named with."""


def local_path(source: str | Path) -> Path:
    """The path of a file; what another URI than `file:` names is downloaded first.

    Args:
        source: a path, a `file:` URI, or a URI that MLflow downloads from.

    Raises:
        UserError: it cannot be downloaded.
    """
    text = str(source)
    if text.startswith("file:"):
        return Path(url2pathname(urlparse(text).path))
    return _downloaded(text) if is_uri(text) else Path(text).expanduser()


def is_uri(text: str) -> bool:
    """Whether a text is a URI, of a file or of a data set of MLflow's, and not a path."""
    return re.match(rf"{DATASET}|[a-z][a-z0-9+.-]+:/", text) is not None


@lru_cache
def _downloaded(uri: str) -> Path:
    """A copy of what a URI names; one per process, removed when it ends."""
    import mlflow
    from mlflow.exceptions import MlflowException

    folder = tempfile.mkdtemp(prefix="phi3-mlflow-set-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=folder))
    except (MlflowException, OSError, ImportError, ValueError) as error:
        raise UserError(
            f"{without_secrets(uri)}: cannot be downloaded: {type(error).__name__}\n"
            "Give a path, or a URI that MLflow downloads from, such as runs:/RUN_ID/mine.jsonl or "
            "s3://BUCKET/mine.jsonl."
        ) from error


def without_secrets(uri: str) -> str:
    """A URI without user name, password and query, to be shown."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))
