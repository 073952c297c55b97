"""OpenAI's messages in the terms of the chat contract: one text each, and its three roles."""

from __future__ import annotations

from typing import Any


def plain_messages(messages: Any) -> Any:
    """Text parts as one text, and the role `developer` as `system`."""
    if not isinstance(messages, list):
        return messages
    return [_plain_message(message) for message in messages]


def _plain_message(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    plain = dict(message)
    if plain.get("role") == "developer":
        plain["role"] = "system"
    parts = plain.get("content")
    if isinstance(parts, list) and parts and all(_is_text(part) for part in parts):
        plain["content"] = "".join(part["text"] for part in parts)
    return plain


def _is_text(part: Any) -> bool:
    return (
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    )
