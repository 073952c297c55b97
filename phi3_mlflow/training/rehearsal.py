"""Texts that have nothing to do with the rows, so that a model does not forget everything else.

A model that learns one task from a few hundred rows soon answers everything in the manner of those
rows. Beside each batch of rows it therefore reads pieces of other texts, and the divergence of what
it predicts there from what it predicted before it was trained, KL(before || now) in nats per token,
counts as loss (learning without forgetting: Li and Hoiem 2016). What it predicted before is what it
predicts without the adapter, so nothing has to be kept or computed beforehand.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from phi3_mlflow.core.errors import UserError
from phi3_mlflow.rows.texts import read_texts, written_out

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from phi3_mlflow.rows.texts import Conversation

_NAME = "train.rehearsal"  # in messages

PIECE = 128
"""Tokens of a text that are read together; a rest of less than half of it is left out."""


def rehearsal_pieces(
    checkpoint: Path, texts: Sequence[str | Conversation]
) -> list[tuple[int, ...]]:
    """Texts as token ids, in pieces of `PIECE` tokens; the last one of a text may have fewer.

    Args:
        checkpoint: a folder with the tokenizer; conversations are written out by its template.
        texts: texts and conversations.

    Raises:
        UserError: they have too few tokens for one piece.
    """
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    pieces = []
    for text in texts:
        ids = tokenizer(written_out(tokenizer, text), add_special_tokens=False)["input_ids"]
        cut = (tuple(ids[start : start + PIECE]) for start in range(0, len(ids), PIECE))
        pieces += [piece for piece in cut if len(piece) >= PIECE // 2]
    if not pieces:
        raise UserError(f"{_NAME}: no text has {PIECE // 2} tokens or more")
    return pieces


def read_rehearsal(file: Path) -> list[str | Conversation]:
    """The texts and conversations of a file.

    Raises:
        UserError: it cannot be read, or a line of it is no text and no conversation.
    """
    return read_texts(file, _NAME)


class Rehearsal:
    """Pieces in an order of their own, a few of them for each batch.

    Args:
        pieces: token ids of each; at least one.
        each: pieces per batch.
        seed: of their order.
    """

    def __init__(self, pieces: Sequence[Sequence[int]], each: int, seed: int) -> None:
        self._pieces, self._each = list(pieces), each
        random.Random(seed).shuffle(self._pieces)

    def batch(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The pieces beside a batch of rows: all come round before any comes again.

        Args:
            number: of the batch, from 0 on, counted over all processes and steps.

        Returns:
            Token ids and attention mask, int64 (pieces, S) each, padded with 0 at the end.
        """
        first = number * self._each
        chosen = [self._pieces[(first + i) % len(self._pieces)] for i in range(self._each)]
        ids = torch.zeros((len(chosen), max(map(len, chosen))), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, piece in enumerate(chosen):
            ids[row, : len(piece)] = torch.tensor(piece)
            mask[row, : len(piece)] = 1
        return ids, mask

    def divergence(self, model: Any, number: int) -> torch.Tensor:
        """How far the model has moved on the pieces beside a batch, in nats per token.

        Args:
            model: peft's, with the adapter on.
            number: of the batch.

        Returns:
            A scalar of float32 with a gradient.
        """
        ids, mask = (tensor.to(model.device) for tensor in self.batch(number))
        places = mask.bool()
        training = model.training
        model.eval()  # what it was has no dropout
        with torch.no_grad(), model.disable_adapter():
            before = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[places]
            before = functional.log_softmax(before.float(), -1)
        model.train(training)
        now = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[places]
        now = functional.log_softmax(now.float(), -1)
        return functional.kl_div(now, before, log_target=True, reduction="batchmean")
