"""The rows that a fine-tuned model is validated with, kept beside it: what its task is.

    {"id": ID, "messages": [{"role": "user", "content": "..."}, ...], "check": {...}}

One line for each row, the assistant's answer last; `check` only where the row has one. Rows that
are left out as too long are not among them, and of rows that say the same there is one.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from pathlib import Path

    from phi3_mlflow.training.conversations import Conversation

VALIDATION = "validation.jsonl"


def write_validation(folder: Path, rows: Iterable[Conversation], used: Collection[str]) -> None:
    """Write the rows that are validated with into a folder; no file where there are none.

    Args:
        folder: an existing directory.
        rows: the validation rows.
        used: ids of those that the loss is measured on.
    """
    chosen: dict[str, Conversation] = {}
    for row in rows:
        if row.id in used:
            chosen.setdefault(row.id, row)
    if chosen:
        text = "".join(_line(row) + "\n" for row in chosen.values())
        (folder / VALIDATION).write_text(text, "utf-8")


def _line(row: Conversation) -> str:
    said = [{"role": message.role, "content": message.content} for message in row.messages]
    check = {} if row.check is None else {"check": row.check}
    return json.dumps({"id": row.id, "messages": said, **check})
