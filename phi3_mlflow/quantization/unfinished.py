"""What a calibrated quantization has finished, kept so that a killed run goes on after it.

    FOLDER/output/            the checkpoint as far as it is written
    FOLDER/states-N.f32       the calibration states after N groups of tensors
    FOLDER/ideal-N.f32        the same through the float layers, where drift is corrected
    FOLDER/progress.json      which of them count, with their hashes

`progress.json` is replaced in one step, after what it names is on the disk. What lies beyond what
it says is debris of the kill and is written anew.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phi3_mlflow.artifacts.manifests import sha256_of_file
from phi3_mlflow.layers.states import States

if TYPE_CHECKING:
    from pathlib import Path

    from phi3_mlflow.checkpoints.writer import CheckpointWriter

SAVE_EVERY_S = 30.0
"""Seconds of work that a kill may cost, beside the layer that is being done."""

_PROGRESS = "progress.json"


@dataclass(frozen=True)
class Found:
    """Where a run goes on.

    Attributes:
        groups: that are done, a layer or a tensor outside them each.
        tensors: that are written.
        states: after them.
        ideal: the states of the float layers, where drift is corrected.
    """

    groups: int
    tensors: int
    states: States
    ideal: States | None


class Unfinished:
    """The folder of one run's unfinished work.

    Args:
        folder: of this work's own; None keeps nothing, and the output is written where it belongs.
        out: where the finished output belongs, on the same disk.
    """

    def __init__(self, folder: Path | None, out: Path) -> None:
        self._folder, self._out = folder, out
        self._saved_at = time.monotonic()
        self.output = out if folder is None else folder / "output"
        self.output.mkdir(parents=True, exist_ok=True)

    def find(self, width: int) -> Found | None:
        """What an earlier run has left whole; anything else is removed.

        Args:
            width: of the hidden states.
        """
        if self._folder is None:
            return None
        try:
            known = json.loads((self._folder / _PROGRESS).read_text("utf-8"))
            states = {
                kind: self._load(file, sha256, width)
                for kind, (file, sha256) in known["states"].items()
            }
            found = Found(known["groups"], known["tensors"], states["states"], states.get("ideal"))
        except (OSError, ValueError, KeyError, TypeError, EOFError):
            shutil.rmtree(self._folder)
            self.output.mkdir(parents=True)
            return None
        self._remove_others(known)
        return found

    def save(
        self, writer: CheckpointWriter, groups: int, states: States, ideal: States | None
    ) -> None:
        """Keep what is finished, unless that was done just now.

        Args:
            writer: of the output.
            groups: that are done.
            states: after them.
            ideal: the states of the float layers, where drift is corrected.
        """
        if self._folder is None or time.monotonic() - self._saved_at < SAVE_EVERY_S:
            return
        files = {}
        for kind, some in {"states": states, "ideal": ideal}.items():
            if some is not None:
                file = self._folder / f"{kind}-{groups}.f32"
                with file.open("wb") as stream:
                    some.save(stream)
                    stream.flush()
                    os.fsync(stream.fileno())
                files[kind] = [file.name, sha256_of_file(file)]
        writer.sync()
        known = {"groups": groups, "tensors": writer.written, "states": files}
        temporary = self._folder / f".{_PROGRESS}"
        with temporary.open("w", encoding="utf-8") as text:
            json.dump(known, text)
            text.flush()
            os.fsync(text.fileno())
        temporary.replace(self._folder / _PROGRESS)
        self._remove_others(known)
        self._saved_at = time.monotonic()

    def deliver(self) -> None:
        """Move the finished output to where it belongs."""
        if self._folder is not None:
            for file in self.output.iterdir():
                file.rename(self._out / file.name)
            # From here on there is nothing to go on with.
            (self._folder / _PROGRESS).unlink(missing_ok=True)

    def _load(self, name: str, sha256: str, width: int) -> States:
        assert self._folder is not None
        file = self._folder / name
        if sha256_of_file(file) != sha256:
            raise ValueError(f"{file} is damaged")
        states = States(file.stat().st_size // (4 * width), width, folder=self._folder)
        with file.open("rb") as stream:
            states.load(stream)
        return states

    def _remove_others(self, known: dict[str, Any]) -> None:
        assert self._folder is not None
        named = {file for file, _ in known["states"].values()}
        for file in self._folder.glob("*.f32"):
            if file.name not in named:
                file.unlink()
