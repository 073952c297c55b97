"""What a step takes: the thing itself, and the identity of its content."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Mapping

    from phi3_mlflow.artifacts.cache import Entry

T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True)
class Input(Generic[T_co]):
    """One input of a step.

    Attributes:
        value: what the work takes: a folder, versions of a model.
        digest: the identity of its content, which decides the key of the output.
        shown: how it is named in the run's parameters: a path, a URI.
        entry: the output in the cache that it is, when it is one.
        files: sha256 by name, where a dry run is to say which of several files has changed.
    """

    value: T_co
    digest: str
    shown: str
    entry: Entry | None = None
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def identity(self) -> str | dict[str, str]:
        """What goes into a key: the hashes of the files, where they are told apart."""
        return dict(self.files) or self.digest


Folder = Input[Path]
"""A folder with files."""
