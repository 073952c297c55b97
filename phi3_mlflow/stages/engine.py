"""Which engine trains a checkpoint on this machine, and whether there is room for it now."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phi3_mlflow.core.machine import whole_memory
from phi3_mlflow.training.data import load_training
from phi3_mlflow.training.masking import TokenizedRows, tokenize_rows
from phi3_mlflow.training.memory import TrainingMemory, engine_for, require_memory

if TYPE_CHECKING:
    from pathlib import Path

    from phi3_mlflow.training.settings import Engine, TrainSettings


def engine_of(
    chosen: TrainSettings, checkpoint: Path, data: Path, validation: Path | None
) -> Engine:
    """The engine that is set, or for `auto` the one that fits this machine.

    Args:
        chosen: the choices.
        checkpoint: that is trained; only headers are read.
        data: the rows, read only where it depends on them.
        validation: those that the loss is measured on, where they have a place of their own.
    """

    def longest() -> int:
        loaded = load_training(
            data,
            format=chosen.format,
            validation=validation,
            validation_share=chosen.validation_share,
        )
        rows = tokenize_rows(checkpoint, loaded.train, max_length=chosen.max_length)
        return _longest(rows, chosen)

    return engine_for(checkpoint, chosen, longest, whole_memory(), _on_gpu)


def require_memory_for(
    checkpoint: Path, chosen: TrainSettings, rows: TokenizedRows
) -> TrainingMemory | None:
    """Refuse to start where the memory that is free does not suffice.

    Returns:
        The estimate; None on a GPU, where it was not measured.

    Raises:
        EnvironmentProblem: there is too little.
    """
    if chosen.engine != "streamed" and _on_gpu():
        return None
    return require_memory(checkpoint, chosen, _longest(rows, chosen))


def _longest(rows: TokenizedRows, chosen: TrainSettings) -> int:
    """Tokens of the longest row, or of the longest sequence of packed ones."""
    from phi3_mlflow.training.packing import pack

    sequences = pack(rows.rows, chosen.max_length) if chosen.packing else rows.rows
    return max((len(row.input_ids) for row in sequences), default=0)


def _on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
