"""A training run, whichever engine computes it: begun or gone on with, ended, written down.

What decides the adapter is the checkpoint, the rows, the settings and the engine: the order of the
rows and the adapter's first values come from the seed, sums are cut up by a fixed number of
threads. A run that was killed goes on from its last checkpoint and ends with the bytes of one that
was not.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from phi3_mlflow.artifacts.manifests import sha256_of_file
from phi3_mlflow.checkpoints.reader import CheckpointReader
from phi3_mlflow.core.errors import UserError
from phi3_mlflow.runtime.adapter import CONFIG, WEIGHTS
from phi3_mlflow.training import processes, resume
from phi3_mlflow.training.lora import adapted_tensors
from phi3_mlflow.training.processes import Job
from phi3_mlflow.training.watch import Listener, named_values, out_of_patience

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from phi3_mlflow.training.settings import TrainSettings
    from phi3_mlflow.training.tokens import Row

KEPT = 2
"""Checkpoints of a run."""

Engine = Callable[[Job, Listener], None]
"""Trains, and leaves checkpoints in the job's folder, each marked when it is whole."""


@dataclass(frozen=True)
class Trained:
    """How a run ended.

    Attributes:
        adapter_sha256: of the adapter's tensors.
        steps: of the optimizer, those of the whole run.
        chosen_step: the one that the adapter is of.
        curve: one mapping per step: `step`, `epoch`, `loss`, `learning_rate`, `grad_norm` and,
            where something is rehearsed, `rehearsal_kl`; or `step`, `epoch`, `validation_loss`. No
            times: equal runs give equal curves.
    """

    adapter_sha256: str
    steps: int
    chosen_step: int
    curve: tuple[dict[str, float], ...]

    def last(self, name: str) -> float | None:
        """The last value of a name in the curve, None where there is none."""
        return next((point[name] for point in reversed(self.curve) if name in point), None)


def carry_out(
    engine: Engine,
    checkpoint: Path,
    rows: Sequence[Row],
    validation: Sequence[Row],
    settings: TrainSettings,
    *,
    folder: Path,
    out: Path,
    base_model: str,
    listener: Listener,
    rehearsal: Sequence[Sequence[int]] = (),
) -> Trained:
    """Train an adapter, or go on where an earlier run of the same was stopped.

    Args:
        engine: does the computing.
        checkpoint: a float checkpoint in Hugging Face layout.
        rows: to train on.
        validation: to measure the loss on; may be empty.
        settings: the choices.
        folder: keeps the run's own checkpoints, for the same work and nothing else.
        out: an existing directory, for the adapter in PEFT's format.
        base_model: the name that the adapter's configuration gives its model; not a path.
        listener: is told the curve.
        rehearsal: token ids of texts on which the model is held to what it was, in pieces.

    Raises:
        UserError: there is nothing to train on, target modules that the model does not have, or a
            loss that is no number or far off; says at which step.
    """
    if not rows:
        raise UserError("there is no row to train on")
    if settings.early_stopping_patience and not validation:
        raise UserError(
            "train.early_stopping_patience needs rows to validate with: give train.validation or "
            "a train.validation_share above 0"
        )
    adapted_tensors(CheckpointReader(checkpoint), settings.target_modules)
    folder.mkdir(parents=True, exist_ok=True)
    ended = resume.finished(folder)
    if ended is None:
        start = resume.last_whole(folder)
        if not (start and out_of_patience(resume.state_of(start)["log_history"], settings)):
            job = Job(checkpoint, rows, validation, settings, folder, start, rehearsal)
            processes.hand_out(job)
            engine(job, listener)
        last = resume.last_whole(folder)
        if last is None:  # the trainer saves after its last step
            raise RuntimeError("training ended without a checkpoint")
        ended = last, _chosen(last, settings)
        resume.set_finished(folder, *ended)
    last, chosen = ended
    _write_adapter(chosen, out, base_model)
    return Trained(
        adapter_sha256=sha256_of_file(out / WEIGHTS),
        steps=int(resume.state_of(last)["global_step"]),
        chosen_step=int(resume.state_of(chosen)["global_step"]),
        curve=_curve(resume.state_of(last)["log_history"]),
    )


def _chosen(last: Path, settings: TrainSettings) -> Path:
    """The checkpoint with the lowest validation loss where stopping early is on, or the last."""
    best = resume.state_of(last).get("best_global_step")
    if not settings.early_stopping_patience or not best:
        return last
    return last.with_name(f"checkpoint-{best}")


def _write_adapter(chosen: Path, out: Path, base_model: str) -> None:
    """Copy the adapter of a checkpoint, with nothing of this machine in its configuration."""
    shutil.copyfile(chosen / WEIGHTS, out / WEIGHTS)
    config = json.loads((chosen / CONFIG).read_text("utf-8"))
    config["base_model_name_or_path"] = base_model
    config["target_modules"] = sorted(config["target_modules"])  # a set has no order
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (out / CONFIG).write_text(text, "utf-8")


def _curve(history: Sequence[Mapping[str, float]]) -> tuple[dict[str, float], ...]:
    return tuple(
        {"step": point["step"], "epoch": point["epoch"], **values}
        for point in history
        if (values := named_values(point))
    )


@contextmanager
def reproducible(threads: int, *, on_gpu: bool = False) -> Iterator[None]:
    """So many threads, and of two ways to compute something the one that always gives the same.

    Args:
        threads: processor threads.
        on_gpu: whether a GPU computes. Attention there goes backward in another order each time
            unless what is not reproducible is an error; a warning is not enough.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.get_num_threads()
    strict = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    deterministic: Any = torch.utils.deterministic
    fills = deterministic.fill_uninitialized_memory
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=not on_gpu)
    # Finds code that reads what nobody wrote; it takes half as much memory again, and time.
    deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        deterministic.fill_uninitialized_memory = fills
        torch.use_deterministic_algorithms(strict, warn_only=warns)
        torch.set_num_threads(before)
