"""Where a model came from and what was done to it, carried from output to output as a file.

`provenance.json` holds nothing that differs between two runs of the same recipe (no times, no
paths), so that equal work gives equal bytes.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from phi3_mlflow.artifacts.manifests import Manifest

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

PROVENANCE_NAME = "provenance.json"
TRAINING_KEYS = ("base_checkpoint_sha256", "data_sha256", "adapter_sha256", "trained_on")
"""What the provenance of a fine-tuned checkpoint holds besides; its version has them as tags."""
LOGGED_AS = "logged_as"
"""The tag that says whether a fine-tuned version is its merged checkpoint or has an adapter."""
TRAINING_TAGS = (*TRAINING_KEYS, LOGGED_AS)
ADAPTER_FOLDER = "adapter"
TRAINING_FILES = (ADAPTER_FOLDER, "training.json", "validation.jsonl")
"""What lies beside a fine-tuned checkpoint and is no part of it: the rows may be confidential."""


def content_manifest(directory: Path) -> Manifest:
    """A directory's files, without the provenance and what is kept of training beside them."""
    manifest = Manifest.of_directory(directory)
    aside = {PROVENANCE_NAME, *TRAINING_FILES}
    return Manifest(tuple(f for f in manifest.files if f.path.partition("/")[0] not in aside))


def content_digest(directory: Path) -> str:
    """The digest of `content_manifest`."""
    return content_manifest(directory).digest


def read_provenance(directory: Path) -> dict[str, Any]:
    """The provenance of an output; empty for a folder that did not come out of a step."""
    try:
        content = json.loads((directory / PROVENANCE_NAME).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_provenance(directory: Path, content: Mapping[str, Any]) -> None:
    """Write the provenance of an output."""
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (directory / PROVENANCE_NAME).write_text(text, "utf-8")
