"""Texts to calibrate with, and rows that the model was trained on, as token sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phi3_mlflow.core.errors import UserError
from phi3_mlflow.rows.texts import read_texts, written_out

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    import torch

    from phi3_mlflow.quantization.settings import GptqSettings
    from phi3_mlflow.rows.texts import Conversation


def calibration_sequences(
    checkpoint: Path, settings: GptqSettings, rows: Sequence[Conversation] = ()
) -> torch.Tensor:
    """Token ids of rows and of the calibration texts, cut into sequences.

    Conversations are written out by the checkpoint's chat template. All are joined by the
    end-of-sequence token and cut, so no token is padding.

    Args:
        checkpoint: a directory with `tokenizer.json`.
        settings: with `calibration`, `calibration_tokens` and `calibration_length`.
        rows: training rows, which come first and take their share as far as they reach; the texts
            fill the rest.

    Returns:
        int64 (sequences, calibration_length).

    Raises:
        UserError: no usable file, no tokenizer, or too little text for one sequence.
    """
    import torch
    from transformers import AutoTokenizer

    texts = read_texts(settings.calibration, "calibration")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(checkpoint), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"calibration needs the tokenizer of {checkpoint}: {error}") from error
    length, wanted = settings.calibration_length, settings.calibration_tokens
    # Whole sequences, so that no sequence is half of the one and half of the other.
    share = round(settings.share_of_rows(trained=bool(rows)) * wanted / length) * length
    tokens = _tokens(tokenizer, rows, share)
    tokens = tokens[: min(share, len(tokens) // length * length)]
    tokens += _tokens(tokenizer, texts, wanted - len(tokens))
    count = min(len(tokens), wanted) // length
    if count == 0:
        raise UserError(
            f"calibration: {settings.calibration} has {len(tokens):,} tokens, fewer than one "
            f"sequence of calibration_length {length:,}"
        )
    return torch.tensor(tokens[: count * length], dtype=torch.int64).reshape(count, length)


def _tokens(tokenizer: Any, texts: Iterable[str | Conversation], enough: int) -> list[int]:
    """Token ids of texts, until there are enough; the last text is whole."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens: list[int] = []
    for text in texts:
        if len(tokens) >= enough:
            break
        tokens += (
            tokenizer(written_out(tokenizer, text), add_special_tokens=False)["input_ids"] + end
        )
    return tokens
