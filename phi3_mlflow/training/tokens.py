"""Rows as tokens: what a trainer takes, whoever has made them."""

from __future__ import annotations

from typing import Protocol

IGNORED = -100
"""The label of a token that carries no loss, as torch has it."""


class Row(Protocol):
    """The tokens of a conversation, and which of them carry loss (1) or not (0)."""

    @property
    def input_ids(self) -> tuple[int, ...]:
        """Token ids."""

    @property
    def loss_mask(self) -> tuple[int, ...]:
        """As long as `input_ids`."""


def labels_of(row: Row) -> list[int]:
    """The token ids of a row that carry loss, and `IGNORED` in the other places."""
    return [
        token if carries else IGNORED
        for token, carries in zip(row.input_ids, row.loss_mask, strict=True)
    ]
