"""A row on its way through scoring: what is asked, and what came of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from phi3_mlflow.evaluation.checks import no_constant
from phi3_mlflow.evaluation.datasets import unique_keys

INPUT_COLUMNS = ("messages", "prompt")
_SHOWN = 200  # characters of a user's own text in a message


@dataclass(frozen=True)
class Result:
    """What came of one row: an answer with its usage, or an error.

    The fields are the columns that scoring adds to a row, in this order.

    Attributes:
        response: the answer's text; None for a row that failed.
        finish_reason: `stop` or `length`; None where the model does not say (prompt contract).
        prompt_tokens, completion_tokens: usage; None where the model does not say.
        error: why there is no answer; None when there is one.
    """

    response: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    error: str | None = None

    def values(self) -> list[Any]:
        return [getattr(self, name) for name in COLUMNS]


COLUMNS = tuple(Result.__dataclass_fields__)
"""The columns that scoring adds."""


@dataclass(frozen=True)
class Row:
    """One row of the input.

    Attributes:
        index: its place among the rows, from 0.
        request: `{"messages": [...]}` or `{"prompt": text}`; None when the row cannot be asked.
        error: why it cannot.
    """

    index: int
    request: dict[str, Any] | None
    error: str | None = None


def make_row(index: int, where: str, values: Mapping[str, Any]) -> Row:
    """Read a row's request.

    Args:
        index: of the row.
        where: as in `line 7`, for the message.
        values: its columns; None, and an empty text in a column, is a value not given.
    """
    given = {name: values[name] for name in INPUT_COLUMNS if values.get(name) not in (None, "", [])}
    if len(given) > 1:
        return Row(index, None, f"{where}: has both prompt and messages; give one of them")
    if not given:
        return Row(index, None, f"{where}: has neither a prompt nor messages")
    name, value = next(iter(given.items()))
    try:
        request = {name: _messages(value) if name == "messages" else _prompt(value)}
    except ValueError as error:
        return Row(index, None, f"{where}: {error}")
    return Row(index, request)


def _prompt(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"prompt: expected a text, found {shown(value)}")
    _check_characters("prompt", value)
    return value


def _messages(value: Any) -> list[dict[str, str]]:
    """Messages as far as MLflow's schema needs them to be right; the model checks the rest."""
    if isinstance(value, str):
        try:
            value = read_json(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"messages: cannot be read as JSON: {error}") from None
    if not isinstance(value, list):
        raise ValueError(f"messages: expected a list of messages, found {shown(value)}")
    for at, message in enumerate(value):
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
        if extra := sorted(set(message) - {"role", "content", "name"}):
            raise ValueError(f"messages[{at}]: unknown fields: {shown(extra)}")
    return value


def _check_characters(where: str, text: str) -> None:
    """MLflow's schema refuses half a character too, but does not say so."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: holds a lone surrogate (half a character) at position {error.start}"
        ) from None


def read_json(text: str) -> Any:
    """Strict JSON: no NaN, no key twice in an object.

    Raises:
        ValueError, RecursionError: it is not.
    """
    return json.loads(text, object_pairs_hook=unique_keys, parse_constant=no_constant)


def shown(value: Any) -> str:
    """A value in a message, in ASCII, cut."""
    text = "nothing" if value is None else ascii(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
