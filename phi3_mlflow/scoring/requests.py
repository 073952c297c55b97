"""What a row of a scored file asks, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phi3_mlflow.rows.faults import shown
from phi3_mlflow.rows.strict_json import read_json
from phi3_mlflow.runtime.plain_messages import plain_messages

if TYPE_CHECKING:
    from collections.abc import Mapping

_FIELDS = ("role", "content", "name")
INPUT_COLUMNS = ("messages", "prompt")
"""The columns that hold what is asked; a row has one of them."""


@dataclass(frozen=True)
class Result:
    """What came of one row: an answer with its usage, or an error.

    The fields are the columns that scoring adds to a row, in this order.

    Attributes:
        response: the answer's text; None for a row that failed.
        finish_reason: `stop` or `length`; None where the model does not say (prompt contract).
        prompt_tokens: tokens of the request; None where the model does not say.
        completion_tokens: tokens of the answer; None where the model does not say.
        error: why there is no answer; None when there is one.
    """

    response: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    error: str | None = None

    def values(self) -> list[Any]:
        """The values of the added columns."""
        return [getattr(self, name) for name in COLUMNS]


COLUMNS = tuple(Result.__dataclass_fields__)
"""The columns that scoring adds."""


@dataclass(frozen=True)
class RowRequest:
    """What one row of the input asks.

    Attributes:
        index: its place among the rows, from 0.
        body: `{"messages": [...]}` or `{"prompt": text}`; None when the row cannot be asked.
        error: why it cannot.
    """

    index: int
    body: dict[str, Any] | None
    error: str | None = None


def request_of(index: int, where: str, values: Mapping[str, Any]) -> RowRequest:
    """Read what a row asks.

    Args:
        index: of the row.
        where: as in `line 7`, for the message.
        values: its columns; None, and an empty text in a column, is a value that is not given.
    """
    given = {name: values[name] for name in INPUT_COLUMNS if values.get(name) not in (None, "", [])}
    if len(given) > 1:
        return RowRequest(index, None, f"{where}: has both prompt and messages; give one of them")
    if not given:
        return RowRequest(index, None, f"{where}: has neither a prompt nor messages")
    name, value = next(iter(given.items()))
    try:
        body = {name: _messages(value) if name == "messages" else _prompt(value)}
    except ValueError as error:
        return RowRequest(index, None, f"{where}: {error}")
    return RowRequest(index, body)


def _prompt(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"prompt: expected a text, found {shown(value)}")
    _check_characters("prompt", value)
    return value


def _messages(value: Any) -> list[dict[str, str]]:
    """Messages, checked as far as MLflow's schema needs it; the model checks the rest."""
    if isinstance(value, str):
        try:
            value = read_json(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"messages: cannot be read as JSON: {error}") from None
    if not isinstance(value, list):
        raise ValueError(f"messages: expected a list of messages, found {shown(value)}")
    messages: list[dict[str, str]] = plain_messages(value)  # as the server takes them
    for at, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(
                f"messages[{at}]: expected an object with role and content, found {shown(message)}"
            )
        for name in ("role", "content"):
            if not isinstance(message.get(name), str):
                raise ValueError(
                    f"messages[{at}].{name}: expected a text, found {shown(message.get(name))}"
                )
            _check_characters(f"messages[{at}].{name}", message[name])
        given = {name for name, part in message.items() if part not in (None, [], "")}
        if extra := sorted(given - set(_FIELDS)):
            raise ValueError(f"messages[{at}]: unknown fields: {shown(extra)}")
    # What is null or empty is not given, and MLflow's schema knows none of it.
    return [
        {name: message[name] for name in _FIELDS if message.get(name) is not None}
        for message in messages
    ]


def _check_characters(where: str, text: str) -> None:
    """MLflow's schema refuses half a character too, but does not say so."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: holds a lone surrogate (half a character) at position {error.start}"
        ) from None
