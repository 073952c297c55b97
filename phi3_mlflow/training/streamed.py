"""The engine that has one layer in memory: weights read from the checkpoint as they are needed.

    forward     each layer read, computed for all rows of a pass, what went into it kept
    head        losses where there are any, and their gradient, some of the vocabulary at a time
    backward    each layer read again, computed again, and gone through

The adapter, its gradients and AdamW's moments are in memory, float32; of the model it is a layer,
and what is kept between layers goes to a file when it is much. Rows are not padded, and each is
computed as it would be by itself. A step of the optimizer is cut into passes of so many tokens, so
that memory depends on the longest row and neither on the batch nor on the accumulation.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerState, get_scheduler

from phi3_mlflow.checkpoints.reader import CheckpointReader
from phi3_mlflow.core.errors import UserError
from phi3_mlflow.core.progress import no_progress
from phi3_mlflow.layers import head
from phi3_mlflow.layers.backward import add_gradients
from phi3_mlflow.layers.decoder import Decoder
from phi3_mlflow.layers.forward import final_states
from phi3_mlflow.layers.layer import groups
from phi3_mlflow.layers.room import PASS_TOKENS
from phi3_mlflow.training import resume
from phi3_mlflow.training.adapter import Adapter
from phi3_mlflow.training.packing import Pack, pack
from phi3_mlflow.training.run import KEPT, carry_out, reproducible
from phi3_mlflow.training.tokens import IGNORED, labels_of
from phi3_mlflow.training.watch import Course, Listener

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from phi3_mlflow.training.processes import Job
    from phi3_mlflow.training.tokens import Row

_OPTIMIZER = "optimizer.pt"
_DROPOUTS = ("attention_dropout", "embd_pdrop", "resid_pdrop")


def _run(job: Job, listener: Listener) -> None:
    with reproducible(job.settings.threads):
        _Training(job, listener).run()


train = partial(carry_out, _run)
"""Train an adapter, one layer in memory at a time; the arguments are `carry_out`'s, less the first.

A checkpoint that asks for dropout is refused. Nothing is rehearsed: the settings refuse `rehearsal`
with this engine.
"""


@dataclass(frozen=True)
class Piece:
    """A row, or one of those that are packed together.

    Attributes:
        tokens: ids, int64 (S,).
        targets: what comes next at every place, int64 (S,), `IGNORED` where there is no loss.
    """

    tokens: torch.Tensor
    targets: torch.Tensor

    @property
    def with_loss(self) -> int:
        """Places that carry loss."""
        return int((self.targets != IGNORED).sum())


def pieces_of(row: Row) -> list[Piece]:
    """A row, or each of those that are packed into one."""
    labels, pieces, start = labels_of(row), [], 0
    for length in row.lengths if isinstance(row, Pack) else (len(row.input_ids),):
        stop = start + length
        targets = torch.tensor([*labels[start + 1 : stop], IGNORED])
        pieces.append(Piece(torch.tensor(row.input_ids[start:stop]), targets))
        start = stop
    return pieces


class _Training:
    """One run, from where it is begun or gone on with to its end."""

    def __init__(self, job: Job, listener: Listener) -> None:
        self._job, settings = job, job.settings
        reader = CheckpointReader(job.checkpoint)
        self._decoder = Decoder(job.checkpoint, reader)
        _refuse_dropout(self._decoder.config, job.checkpoint)
        self._adapter = Adapter(reader, settings)
        rows = pack(job.rows, settings.max_length) if settings.packing else job.rows
        self._rows = [pieces_of(row) for row in rows]
        self._validation = [pieces_of(row) for row in job.validation]
        self._batches_of_epoch = math.ceil(len(rows) / settings.per_device_train_batch_size)
        self._steps_of_epoch = math.ceil(
            self._batches_of_epoch / settings.gradient_accumulation_steps
        )
        steps = settings.num_train_epochs * self._steps_of_epoch
        self._optimizer = torch.optim.AdamW(
            self._adapter.parameters,
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self._scheduler: Any = get_scheduler(
            settings.lr_scheduler_type,
            self._optimizer,
            num_warmup_steps=math.ceil(steps * settings.warmup_ratio),
            num_training_steps=steps,
        )
        self._state = TrainerState(epoch=0, max_steps=steps)
        self._course = Course(settings, listener, job.folder, self._decoder.vocabulary)
        self._tokens = 0  # that this process has trained on

    def run(self) -> None:
        """Train to the end, or until the patience is over."""
        if self._job.start:
            self._go_on_from(self._job.start)
        state, settings = self._state, self._job.settings
        self._course.begins(state)
        if self._validation and not self._job.start:
            self._validate()
        while state.global_step < state.max_steps:
            self._step()
            last = state.global_step >= state.max_steps
            saves = last or state.global_step % settings.save_steps == 0
            over = False
            if self._validation and saves:
                self._note_best(self._validate())
                over = self._course.is_over(state)
            if saves:
                self._save()
            if over:
                break

    def _step(self) -> None:
        """One step of the optimizer, on all batches that are accumulated for it."""
        state, settings = self._state, self._job.settings
        epoch, update = divmod(state.global_step, self._steps_of_epoch)
        per_step = settings.gradient_accumulation_steps * settings.per_device_train_batch_size
        chosen = self._order(epoch)[update * per_step : (update + 1) * per_step]
        pieces = [piece for number in chosen for piece in self._rows[number]]
        count = max(1, sum(piece.with_loss for piece in pieces))
        loss = 0.0
        for some in _passes(pieces):
            losses = add_gradients(
                self._decoder,
                self._adapter,
                [piece.tokens for piece in some],
                [piece.targets for piece in some],
                scale=1 / count,
                folder=self._job.folder,
            )
            loss += float(losses.sum())
        self._tokens += sum(len(piece.tokens) for piece in pieces)
        norm = torch.nn.utils.clip_grad_norm_(self._adapter.parameters, settings.max_grad_norm)
        self._optimizer.step()
        rate = self._scheduler.get_last_lr()[0]
        self._scheduler.step()
        self._optimizer.zero_grad()
        state.global_step += 1
        batches = min((update + 1) * settings.gradient_accumulation_steps, self._batches_of_epoch)
        state.epoch = epoch + batches / self._batches_of_epoch
        self._log(
            loss=loss / count,
            grad_norm=float(norm),
            learning_rate=rate,
            num_tokens=float(self._tokens),
        )

    def _order(self, epoch: int) -> list[int]:
        """The rows' numbers in the order of an epoch, that of the other engine."""
        generator = torch.Generator().manual_seed(self._job.settings.seed + epoch)
        return torch.randperm(len(self._rows), generator=generator).tolist()

    def _validate(self) -> float:
        """The mean over the validation rows of their batch's loss per token."""
        pieces = [piece for row in self._validation for piece in row]
        losses = torch.split(self._losses(pieces), [piece.with_loss for piece in pieces])
        size, total = self._job.settings.per_device_train_batch_size, 0.0
        for start in range(0, len(losses), size):
            batch = losses[start : start + size]
            total += len(batch) * float(torch.cat(batch).sum()) / max(1, sum(map(len, batch)))
        loss = total / len(losses)
        self._log(eval_loss=loss)
        return loss

    def _losses(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """Nats at all places that carry loss, of one piece after another."""
        with no_progress("", None) as meter:
            states = final_states(
                self._decoder,
                [piece.tokens for piece in pieces],
                meter,
                folder=self._job.folder,
                adapt=self._adapter,
            )
        targets, found = torch.cat([piece.targets for piece in pieces]), []
        for start, stop in states.parts(PASS_TOKENS):
            chosen = targets[start:stop] != IGNORED
            some = states.read(start, stop)[chosen]
            found.append(head.losses(self._decoder, some, targets[start:stop][chosen])[0])
        return torch.cat(found)

    def _note_best(self, loss: float) -> None:
        state = self._state
        if not self._job.settings.early_stopping_patience:
            return
        if state.best_metric is None or loss < state.best_metric:
            state.best_metric, state.best_global_step = loss, state.global_step

    def _log(self, **values: float) -> None:
        state = self._state
        point = {**values, "epoch": state.epoch, "step": state.global_step}
        state.log_history.append(point)
        self._course.logged(state, values)

    def _save(self) -> None:
        """Write a checkpoint, mark it as whole, and remove what is older than two."""
        state, folder = self._state, self._job.folder
        place = folder / f"checkpoint-{state.global_step}"
        place.mkdir()
        self._adapter.save(place)
        content = {
            "optimizer": self._optimizer.state_dict(),
            "scheduler": self._scheduler.state_dict(),
        }
        with (place / _OPTIMIZER).open("wb") as stream:
            torch.save(content, stream)
        state.save_to_json(str(place / resume.STATE))
        self._course.saved(state)
        there = sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))
        kept = {state.global_step, state.best_global_step}
        older = [step for step in there if step not in kept]
        for step in older[: len(there) - KEPT]:
            shutil.rmtree(folder / f"checkpoint-{step}")

    def _go_on_from(self, place: Path) -> None:
        self._adapter.load(place)
        content = torch.load(place / _OPTIMIZER, weights_only=True)
        self._optimizer.load_state_dict(content["optimizer"])
        self._scheduler.load_state_dict(content["scheduler"])
        self._state = TrainerState.load_from_json(str(place / resume.STATE))


def _passes(pieces: Sequence[Piece]) -> Iterator[Sequence[Piece]]:
    """Rows that go through the layers together: so many tokens, or one longer row."""
    start = 0
    for group in groups([len(piece.tokens) for piece in pieces], PASS_TOKENS):
        yield pieces[start : start + len(group)]
        start += len(group)


def _refuse_dropout(config: Any, checkpoint: Path) -> None:
    asked = {name: share for name in _DROPOUTS if (share := getattr(config, name, 0))}
    if asked:
        named = ", ".join(f"{name} {share:g}" for name, share in asked.items())
        raise UserError(
            f"{checkpoint / 'config.json'} has {named}, and train.engine streamed leaves nothing "
            "out at random. Set it to 0 there, or choose train.engine: memory."
        )
