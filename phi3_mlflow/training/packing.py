"""Several rows in one sequence, none of which sees another.

A batch of rows of different lengths is padded to the longest; rows laid end to end are not. What
keeps them apart are the positions: they begin again at 0 with every row, and without a mask of its
own transformers takes every such beginning for another sequence, in attention of any kind. Padding
behind the last row is of sequences of one token each.

trl packs as well, for flash attention alone: on others it warns that rows see one another.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from phi3_mlflow.training.tokens import IGNORED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phi3_mlflow.training.tokens import Row


@dataclass(frozen=True)
class Pack:
    """Rows end to end.

    Attributes:
        input_ids: the tokens of all.
        loss_mask: 1 for every token that carries loss; as long as `input_ids`.
        lengths: tokens of each row.
    """

    input_ids: tuple[int, ...]
    loss_mask: tuple[int, ...]
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Pack:
        """These rows, in this order."""
        return cls(
            tuple(token for row in rows for token in row.input_ids),
            # Nothing of its own row stands before the first token.
            tuple(carries for row in rows for carries in (0, *row.loss_mask[1:])),
            tuple(len(row.input_ids) for row in rows),
        )


def pack(rows: Sequence[Row], max_length: int) -> list[Pack]:
    """Lay rows into as few sequences as best-fit-decreasing does.

    Args:
        rows: each of at most `max_length` tokens.
        max_length: tokens in a sequence.

    Returns:
        The sequences; the same rows in the same order give the same ones.
    """
    contents: list[list[Row]] = []
    free: list[tuple[int, int]] = []  # tokens that a sequence has left, and its number; sorted
    for row in sorted(rows, key=lambda row: -len(row.input_ids)):
        length = len(row.input_ids)
        at = bisect.bisect_left(free, (length, -1))
        room, number = free.pop(at) if at < len(free) else (max_length, len(contents))
        if number == len(contents):
            contents.append([])
        contents[number].append(row)
        bisect.insort(free, (room - length, number))
    return [Pack.of(content) for content in contents]


class PackCollator:
    """Makes batches of sequences, with positions and without a mask; of single rows, too."""

    def __init__(self, padding: int) -> None:
        self._padding = padding  # a token

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Tensors `input_ids`, `labels` and `position_ids`, each (B, S), int64."""
        shape = len(examples), max(len(one["input_ids"]) for one in examples)
        ids = torch.full(shape, self._padding)
        labels = torch.full(shape, IGNORED)
        positions = torch.zeros(shape, dtype=torch.int64)
        for number, one in enumerate(examples):
            length = len(one["input_ids"])
            ids[number, :length] = torch.tensor(one["input_ids"])
            labels[number, :length] = torch.tensor(one["labels"])
            lengths = one.get("seq_lengths") or [length]
            positions[number, :length] = torch.cat([torch.arange(n) for n in lengths])
        return {"input_ids": ids, "labels": labels, "position_ids": positions}


def tokens_in(position_ids: torch.Tensor) -> torch.Tensor:
    """How many tokens of a batch are no padding.

    Args:
        position_ids: (B, S); a row has two tokens or more, padding is of single ones.
    """
    return (position_ids > 0).sum() + (position_ids == 1).sum()
