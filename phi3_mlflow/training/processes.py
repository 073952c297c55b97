"""Several processes that train one model together, each on its share of every batch.

    accelerate launch --num_processes 2 -m steps.train --profile my-profile.yaml
    torchrun --nproc-per-node 2 -m steps.train --profile my-profile.yaml

The first of them does the step as if it were alone, and hands the others the work when it has come
to the training; they write nothing but their random state into the run's checkpoints. On several
machines the cache has to be a folder that all of them see.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from phi3_mlflow.training.settings import TrainSettings
    from phi3_mlflow.training.tokens import Row

_PATIENCE = timedelta(days=1)  # the others wait while the first reads rows

_handed_out = 0  # times that work, or none, was handed out


@dataclass(frozen=True)
class Job:
    """What is to be trained.

    Attributes:
        checkpoint: a float checkpoint in Hugging Face layout.
        rows: to train on.
        validation: to measure the loss on; may be empty.
        settings: the choices.
        folder: for the run's checkpoints.
        start: the checkpoint to go on from, where there is one.
        rehearsal: token ids of what is rehearsed, in pieces; may be empty.
    """

    checkpoint: Path
    rows: Sequence[Row]
    validation: Sequence[Row]
    settings: TrainSettings
    folder: Path
    start: Path | None
    rehearsal: Sequence[Sequence[int]] = ()


def count() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the process that does the step."""
    return count() == 1 or int(os.environ.get("RANK", "0")) == 0


def hand_out(job: Job | None) -> None:
    """Give the others the work, or None when there is none for them."""
    if count() > 1:
        _exchange(job)


def receive() -> Job | None:
    """What the first process hands out, once it has."""
    return _exchange(None)


def wait_for_all() -> None:
    """Go on when all processes are here."""
    if count() > 1:
        from torch import distributed

        distributed.barrier()


@contextmanager
def leading() -> Iterator[None]:
    """Let the others go in the end, also when it has not come to the training.

    Not when it is stopped from outside: whoever stops it stops them, too, and nobody would listen.
    """
    before = _handed_out
    try:
        yield
    except Exception:
        _dismiss(before)
        raise
    _dismiss(before)


def _dismiss(before: int) -> None:
    if _handed_out == before:
        hand_out(None)


def _exchange(job: Job | None) -> Job | None:
    """Pass an object from the first process to all."""
    global _handed_out
    import torch
    from torch import distributed

    if not distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, timeout=_PATIENCE)
    handed = [job]
    distributed.broadcast_object_list(handed, src=0)
    _handed_out += 1
    return handed[0]
