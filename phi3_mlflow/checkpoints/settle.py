"""Give a sound checkpoint the one spelling that every reader takes alike.

transformers, the graph builder and the quantizers each read `config.json`, and not all of it in the
same way. What is put straight here, once, at the fetch, means the same as before to transformers;
a checkpoint that is spelled well stays as it is, byte for byte.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from phi3_mlflow.checkpoints import layout
from phi3_mlflow.checkpoints.configuration import DTYPE_KEYS, stated_dtype
from phi3_mlflow.checkpoints.reader import CheckpointReader, read_config
from phi3_mlflow.checkpoints.rope import settled_rope

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
_ROWS = 4096
"""Rows of head and embedding that are compared at once, to keep the copies small."""


def settle_checkpoint(directory: Path) -> list[str]:
    """Rewrite `config.json` where readers would differ about it.

    Args:
        directory: a checkpoint that `validate_checkpoint` has passed.

    Returns:
        What was changed, one sentence each; empty when every file is as it was.
    """
    config = read_config(directory)
    settled, rope = settled_rope(config)
    changes = [f"{layout.CONFIG}: {change}" for change in rope]
    changes += _settle_dtype(settled)
    if has_own_head(settled, CheckpointReader(directory)):
        settled["tie_word_embeddings"] = False
        changes.append(
            f"{layout.CONFIG}: tie_word_embeddings is false now; the weights hold a head "
            f"({HEAD}) that differs from the embedding, and transformers answers with it"
        )
    if changes:
        text = json.dumps(settled, indent=2, ensure_ascii=False) + "\n"
        (directory / layout.CONFIG).write_text(text, "utf-8")
    return changes


def has_own_head(config: Mapping[str, Any], reader: CheckpointReader) -> bool:
    """Whether a head is stored that differs from the embedding it is said to share.

    Args:
        config: the content of `config.json`.
        reader: the tensors; reads head and embedding where both are there and should be one.
    """
    if not config.get("tie_word_embeddings", False) or HEAD not in reader:
        return False
    rows = reader.shape(EMBEDDING)[0]
    if reader.shape(HEAD) != reader.shape(EMBEDDING):
        return True
    for start in range(0, rows, _ROWS):
        part = slice(start, min(start + _ROWS, rows))
        if not bool((reader.read(HEAD, part) == reader.read(EMBEDDING, part)).all()):
            return True
    return False


def _settle_dtype(config: dict[str, Any]) -> list[str]:
    """Leave out what names no dtype, and spell the others plainly."""
    changes = []
    for key in DTYPE_KEYS:
        if key not in config:
            continue
        said, plain = config[key], stated_dtype(config[key])
        if plain is None:
            del config[key]
            changes.append(f"{layout.CONFIG}: {key} {json.dumps(said)} left out")
        elif said != plain:
            config[key] = plain
            changes.append(f"{layout.CONFIG}: {key} {said} is {plain}")
    return changes
