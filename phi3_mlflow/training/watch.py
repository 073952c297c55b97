"""Watching a training run: its curve is told, its checkpoints marked, and it is stopped in time."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from phi3_mlflow.core.errors import UserError
from phi3_mlflow.training import processes, resume

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from phi3_mlflow.training.settings import TrainSettings

_FAR_OFF = 2.0  # times the loss of the untrained model, or, for a single batch, that of guessing


class Stopped(Exception):
    """Training went astray; in a process that does not say so itself."""


class Listener(Protocol):
    """Told how the run goes."""

    def begins(self, step: int, steps: int) -> None:
        """Training starts, or goes on, after `step` of `steps` steps."""

    def point(self, step: int, values: Mapping[str, float]) -> None:
        """Values of a step: `loss`, `learning_rate`, `grad_norm`, `tokens_per_second`.

        Where something is rehearsed, `rehearsal_kl` is how far the model has moved there.

        `validation_loss` comes by itself, where there are rows to validate with.
        """


class Course:
    """What a run does beside computing: tells its curve, marks checkpoints, stops astray ones.

    Args:
        settings: the choices.
        listener: is told the curve.
        folder: of the run's checkpoints.
        vocabulary: tokens that the model knows.
    """

    def __init__(
        self, settings: TrainSettings, listener: Listener, folder: Path, vocabulary: int
    ) -> None:
        self._settings, self._listener, self._folder = settings, listener, folder
        self._guessing = math.log(vocabulary)
        self._seen, self._at = 0.0, 0.0

    def begins(self, state: TrainerState) -> None:
        """The start, or where the run goes on."""
        self._at = time.monotonic()
        self._listener.begins(state.global_step, state.max_steps)

    def logged(self, state: TrainerState, logs: Mapping[str, float]) -> None:
        """A point of the curve, which is in the state's history already.

        Raises:
            UserError: it has gone astray.
        """
        values = named_values(logs)
        if not values:
            return
        self._stop_if_lost(state, values)
        now = time.monotonic()
        if "loss" in values:
            seen = float(logs.get("num_tokens", 0))
            values["tokens_per_second"] = (seen - self._seen) / max(now - self._at, 1e-9)
            self._seen = seen
        self._at = now
        self._listener.point(state.global_step, values)

    def is_over(self, state: TrainerState) -> bool:
        """Whether the patience is."""
        return out_of_patience(state.log_history, self._settings)

    def saved(self, state: TrainerState) -> None:
        """A checkpoint has been written, by all processes."""
        processes.wait_for_all()
        if processes.is_first():
            resume.mark_whole(self._folder / f"checkpoint-{state.global_step}")

    def _stop_if_lost(self, state: TrainerState, values: Mapping[str, float]) -> None:
        """Stop where a value is no number, or the model has become far worse than it was."""
        lost = [name for name, value in values.items() if not math.isfinite(value)]
        before = _first(state.log_history, "loss")
        if values.get("loss", 0.0) > _FAR_OFF * max(self._guessing, before):
            lost.append("loss")
        # The same rows each time, so that there is no chance in it.
        before = _first(state.log_history, "eval_loss")
        if values.get("validation_loss", 0.0) > _FAR_OFF * before > 0:
            lost.append("validation_loss")
        if not lost:
            return
        if not processes.is_first():
            raise Stopped
        good = resume.last_whole(self._folder)
        kept = f"its last checkpoint is {good}" if good else "there is no checkpoint of it"
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        raise UserError(
            f"training was stopped at step {state.global_step} of {state.max_steps}, because the "
            f"{' and '.join(dict.fromkeys(lost))} went astray: {shown}.\n"
            f"Nothing was made of it; {kept}. Choose a lower train.learning_rate than "
            f"{self._settings.learning_rate:g}, or a higher train.warmup_ratio."
        )


class Watch(Course, TrainerCallback):
    """The same, called by transformers' trainer."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """The start, or where the run goes on."""
        self.begins(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Also the last step is validated."""
        if state.global_step >= state.max_steps and args.eval_steps:
            control.should_evaluate = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """A point of the curve."""
        self.logged(state, logs or {})

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Stop when the patience is over."""
        if self.is_over(state):
            control.should_save = control.should_training_stop = True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """A checkpoint has been written."""
        self.saved(state)


def named_values(logs: Mapping[str, float]) -> dict[str, float]:
    """What the trainer has logged, by the names of this project."""
    if "eval_loss" in logs:
        return {"validation_loss": float(logs["eval_loss"])}
    if "loss" not in logs:
        return {}
    names = ("loss", "learning_rate", "grad_norm", "rehearsal_kl")
    return {name: float(logs[name]) for name in names if name in logs}


def out_of_patience(history: Sequence[Mapping[str, float]], settings: TrainSettings) -> bool:
    """Whether the validation loss has not fallen as often in a row as the settings allow."""
    losses = [point["eval_loss"] for point in history if "eval_loss" in point]
    if not settings.early_stopping_patience or not losses:
        return False
    since = len(losses) - 1 - losses.index(min(losses))
    return since >= settings.early_stopping_patience


def _first(history: Sequence[Mapping[str, float]], name: str) -> float:
    """The first value that was logged under a name; 0 before there is one."""
    return next((point[name] for point in history if name in point), 0.0)
