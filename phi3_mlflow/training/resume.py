"""Checkpoints of a run that can be killed at any moment, and finding the last that is whole.

    FOLDER/checkpoint-STEP/...             adapter, optimizer, schedule, random state
    FOLDER/checkpoint-STEP/manifest.json   written last: size and hash of every other file
    FOLDER/finished.json                   which checkpoint the run ended with

The trainer writes a checkpoint file by file, so one without its manifest, or that differs from it,
was being written when the run was killed.
"""

from __future__ import annotations

import json
import re
import shutil
from typing import TYPE_CHECKING, Any

from phi3_mlflow.artifacts.manifests import Manifest
from phi3_mlflow.core.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

STATE = "trainer_state.json"
_FINISHED = "finished.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def mark_whole(checkpoint: Path) -> None:
    """Say that everything of a checkpoint has been written."""
    Manifest.of_directory(checkpoint).write(checkpoint)


def last_whole(folder: Path) -> Path | None:
    """The checkpoint that a run goes on from; what is not whole is removed."""
    found: dict[int, Path] = {}
    for path in folder.glob("checkpoint-*"):
        step = _CHECKPOINT.fullmatch(path.name)
        if step and _is_whole(path):
            found[int(step[1])] = path
        else:
            shutil.rmtree(path, ignore_errors=True)
    return found[max(found)] if found else None


def state_of(checkpoint: Path) -> dict[str, Any]:
    """What the trainer knew when it wrote a checkpoint."""
    state: dict[str, Any] = json.loads((checkpoint / STATE).read_text("utf-8"))
    return state


def set_finished(folder: Path, last: Path, chosen: Path) -> None:
    """Say that nothing is left to train, and which checkpoints were the last and the best."""
    content = json.dumps({"last": last.name, "chosen": chosen.name})
    partial = folder / f".{_FINISHED}"
    partial.write_text(content + "\n", "utf-8")
    partial.replace(folder / _FINISHED)


def finished(folder: Path) -> tuple[Path, Path] | None:
    """The last checkpoint and the chosen one of a run that has ended, when both are whole."""
    try:
        content = json.loads((folder / _FINISHED).read_text("utf-8"))
        last, chosen = folder / content["last"], folder / content["chosen"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (last, chosen) if _is_whole(last) and _is_whole(chosen) else None


def _is_whole(checkpoint: Path) -> bool:
    try:
        return not Manifest.read(checkpoint).differences(checkpoint)
    except (UserError, OSError, ValueError, KeyError):
        return False
