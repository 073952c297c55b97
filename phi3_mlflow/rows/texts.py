"""Texts and conversations that are read as they are: to calibrate with, or to rehearse."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phi3_mlflow.core.errors import UserError
from phi3_mlflow.rows.faults import shown
from phi3_mlflow.rows.jsonl_file import JsonlFile

if TYPE_CHECKING:
    from pathlib import Path

    from phi3_mlflow.rows.records import Record

Conversation = list[dict[str, str]]


def read_texts(file: Path, purpose: str) -> list[str | Conversation]:
    """The texts of a file.

    Args:
        file: `*.jsonl`: one JSON object per line with the key `text` or, for a conversation,
            `messages` (objects with `role` and `content`); anything else is plain text, one text.
        purpose: what they are for, for messages.

    Raises:
        UserError: the file is not there, is not text, or a line of it is not as it should be.
    """
    if not file.is_file():
        raise UserError(f"{purpose}: {file} cannot be read: there is no such file")
    if file.suffix == ".jsonl":
        return [_entry(file, record, purpose) for record in JsonlFile(file).records()]
    try:
        return [file.read_text(encoding="utf-8")]
    except OSError as error:
        raise UserError(f"{purpose}: {file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{purpose}: {file} is not UTF-8 text") from error


def written_out(tokenizer: Any, text: str | Conversation) -> str:
    """A text as it is; a conversation as the tokenizer's chat template writes it, if there is one.

    Args:
        tokenizer: of transformers.
        text: a text or a conversation.
    """
    if isinstance(text, str):
        return text
    if tokenizer.chat_template:
        return str(tokenizer.apply_chat_template(text, tokenize=False))
    return "\n\n".join(message["content"] for message in text)


def _entry(file: Path, record: Record, purpose: str) -> str | Conversation:
    if record.fault is None:
        text, messages = record.values.get("text"), record.values.get("messages")
        if isinstance(text, str):
            return text
        if isinstance(messages, list) and messages and all(map(_is_message, messages)):
            return [{"role": m["role"], "content": m["content"]} for m in messages]
    found = str(record.fault) if record.fault else f"found {shown(record.values)}"
    raise UserError(
        f'{purpose}: {file}, {record.where}: expected {{"text": "..."}} or {{"messages": '
        f'[{{"role": "...", "content": "..."}}]}}; {found}'
    )


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and all(
        isinstance(message.get(key), str) for key in ("role", "content")
    )
