"""The files that rows are read from: one, a saved dataset, or all of a folder or a pattern.

    row_files(Path("tickets.jsonl")).digest
    row_files(Path("tickets")).paths            # every file of rows in the folder, by name
    row_files(Path("tickets/2026-*.jsonl"))

A file that is added to the folder later is found by the next run, without any edit of a profile.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from phi3_mlflow.artifacts.manifests import FileEntry, Manifest, sha256_of_file
from phi3_mlflow.artifacts.provenance import content_digest
from phi3_mlflow.core.errors import UserError
from phi3_mlflow.rows.dataset_folder import DatasetFolder
from phi3_mlflow.rows.files import FORMATS, open_rows

if TYPE_CHECKING:
    from collections.abc import Mapping

_PATTERN = re.compile(r"[*?[]")


@dataclass(frozen=True)
class RowFiles:
    """Files of rows, and the identity of what they hold.

    Attributes:
        paths: to read, in the order of their names.
        digest: sha256 as hex: of the file, of a saved dataset's content, or over the names and the
            contents of several.
        hashes: sha256 by name where a folder or a pattern was given; empty otherwise.
    """

    paths: tuple[Path, ...]
    digest: str
    hashes: Mapping[str, str]


def row_files(data: Path) -> RowFiles:
    """The files of rows at a place, with their hashes.

    Args:
        data: a file, a folder that `datasets` saved, a folder of files, or a pattern of names.

    Raises:
        UserError: there are none, or one cannot be read.
    """
    try:
        if DatasetFolder.is_one(data):
            return RowFiles((data,), content_digest(data), {})
        if data.is_dir():
            kinds = (file for file in data.iterdir() if file.suffix.lower() in FORMATS)
            return several(data, [file for file in kinds if file.is_file()], data)
        if is_pattern(data):
            base, pattern = _parts(data)
            return several(base, [file for file in base.glob(pattern) if file.is_file()], data)
        open_rows(data)
        return RowFiles((data,), sha256_of_file(data), {})
    except OSError as error:
        raise UserError(f"{error.filename or data} cannot be read: {error.strerror}") from error


def is_pattern(data: Path) -> bool:
    """Whether a place is a pattern of names, and no file that is really called so."""
    return _PATTERN.search(str(data)) is not None and not data.exists()


def several(base: Path, files: list[Path], place: Path) -> RowFiles:
    """Files below a folder, in the order of their names, which count as well as the contents.

    Raises:
        UserError: there are none.
    """
    if not files:
        kinds = ", ".join(FORMATS)
        raise UserError(f"there is no file of rows in {place.absolute()}; looked for {kinds}")
    named = sorted((file.relative_to(base).as_posix(), file) for file in files)
    entries = [FileEntry(name, path.stat().st_size, sha256_of_file(path)) for name, path in named]
    return RowFiles(
        tuple(path for _, path in named),
        Manifest(tuple(entries)).digest,
        {entry.path: entry.sha256 for entry in entries},
    )


def _parts(place: Path) -> tuple[Path, str]:
    """A place with a pattern, taken apart: the folder above it, and the pattern."""
    parts = place.parts
    first = next(i for i in range(len(parts)) if not Path(*parts[: i + 1]).exists())
    return Path(*parts[:first]), "/".join(parts[first:])
