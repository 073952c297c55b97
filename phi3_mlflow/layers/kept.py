"""The states of texts after a layer, kept so that a killed run goes on after it.

    FOLDER/states-LAYERS-SHA256.f32

A file gets this name when all of it is on the disk. What has no such name, or another content than
its name says, is debris of the kill.
"""

from __future__ import annotations

import os
import re
import time
from typing import TYPE_CHECKING

from phi3_mlflow.artifacts.manifests import sha256_of_file
from phi3_mlflow.layers.states import States

if TYPE_CHECKING:
    from pathlib import Path

SAVE_EVERY_S = 30.0
"""Seconds of work that a kill may cost, beside the layer that is being done."""

_NAME = re.compile(r"states-(\d+)-([0-9a-f]{64})\.f32")


class KeptStates:
    """States that are kept in a folder of their own.

    Args:
        folder: nobody else writes there meanwhile.
        width: of a row of the states.
        places: rows that they have.
    """

    def __init__(self, folder: Path, width: int, places: int) -> None:
        self._folder, self._width, self._places = folder, width, places
        self._saved_at = time.monotonic()

    def find(self) -> tuple[int, States] | None:
        """The layers that are done, and the states after them; what is not whole is removed."""
        for layers, sha256, file in self._there():
            if sha256_of_file(file) == sha256 and self._size() == file.stat().st_size:
                self._remove_others(file)
                states = States(self._places, self._width, folder=self._folder)
                with file.open("rb") as stream:
                    states.load(stream)
                return layers, states
        self._remove_others(None)
        return None

    def save(self, layers: int, states: States) -> None:
        """Keep the states after so many layers, unless that was done just now."""
        if not layers or time.monotonic() - self._saved_at < SAVE_EVERY_S:
            return
        begun = self._folder / "begun.f32"
        try:
            with begun.open("wb") as stream:
                states.save(stream)
                stream.flush()
                os.fsync(stream.fileno())
            file = begun.replace(self._folder / f"states-{layers}-{sha256_of_file(begun)}.f32")
            self._remove_others(file)
        except OSError:  # a full disk: the work itself needs none of this
            self._remove_others(None)
        self._saved_at = time.monotonic()

    def _there(self) -> list[tuple[int, str, Path]]:
        """Layers, hash and file of what was saved, the most layers first."""
        found = [(_NAME.fullmatch(file.name), file) for file in self._folder.glob("*.f32")]
        named = [(int(name[1]), name[2], file) for name, file in found if name]
        return sorted(named, reverse=True)

    def _size(self) -> int:
        return 4 * self._places * self._width

    def _remove_others(self, kept: Path | None) -> None:
        for file in self._folder.glob("*.f32"):
            if file != kept:
                file.unlink()
