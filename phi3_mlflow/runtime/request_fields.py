"""Reading the fields of a request: each with its checks, problems collected and not raised."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .json_schema import bounded

MAX_TOP_LOGPROBS = 20
MAX_STOPS = 64
MAX_STOP_CHARACTERS = 1000


class RequestFields:
    """The fields of one request, read with checks; problems are collected, not raised.

    A field that is null is one that is not given.
    """

    def __init__(self, row: Mapping[str, Any]) -> None:
        self.row = {name: value for name, value in row.items() if value is not None}
        self.problems: list[str] = []

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """Read a number from `low` to `high`; `default` when it is absent or wrong."""
        value = self.row.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.problems.append(f"{name}: expected a number, found {kind_of(value)}")
        elif not low <= value <= high:  # false for NaN too
            self.problems.append(f"{name}: {value} is not between {low:g} and {high:g}")
        else:
            return float(value)
        return default

    def whole(self, name: str, default: int | None, low: int, high: int) -> int | None:
        """Read a whole number from `low` to `high`; `default` when it is absent or wrong."""
        value = self.row.get(name, default)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            self.problems.append(f"{name}: expected a whole number, found {kind_of(value)}")
        elif value < low:
            self.problems.append(f"{name}: {value} is below {low}")
        elif value > high:
            self.problems.append(f"{name}: {value} is above {high}")
        else:
            return value
        return default

    def stop(self) -> tuple[str, ...]:
        """Read the stop texts: one, a list of them, or none."""
        value = self.row.get("stop", ())
        if isinstance(value, str):
            value = [value]
        if not isinstance(value, list | tuple):
            self.problems.append(
                f"stop: expected a text or a list of texts, found {kind_of(value)}"
            )
            return ()
        if len(value) > MAX_STOPS:
            self.problems.append(f"stop: {len(value)} texts, at most {MAX_STOPS} are taken")
            return ()
        for index, text in enumerate(value):
            if not isinstance(text, str) or not text:
                self.problems.append(f"stop[{index}]: expected a text of at least one character")
            elif len(text) > MAX_STOP_CHARACTERS:
                self.problems.append(
                    f"stop[{index}]: {len(text)} characters, {MAX_STOP_CHARACTERS} are taken"
                )
        return tuple(text for text in value if isinstance(text, str) and text)

    def top_logprobs(self) -> int | None:
        """Read how many alternatives to each token are wanted; None wants no log probabilities."""
        wanted = self.row.get("logprobs")
        if wanted is not None and not isinstance(wanted, bool):
            self.problems.append(f"logprobs: expected true or false, found {kind_of(wanted)}")
        top = self.whole("top_logprobs", None, 0, MAX_TOP_LOGPROBS)
        if top and not wanted:
            self.problems.append("top_logprobs: needs logprobs: true")
        return (top or 0) if wanted is True else None

    def schema(self, room: int) -> str | None:
        """The JSON schema of `response_format`, as text.

        Args:
            room: tokens that an answer may have.
        """
        wanted = self.row.get("response_format")
        if wanted is None:
            return None
        kind = wanted.get("type") if isinstance(wanted, Mapping) else None
        if kind == "text":
            return None
        if kind == "json_object":
            return bounded({"type": "object"}, room)[0]
        if kind != "json_schema":
            self.problems.append(
                "response_format: expected an object whose type is text, json_object or json_schema"
            )
            return None
        about = wanted.get("json_schema")
        schema = about.get("schema") if isinstance(about, Mapping) else None
        if not isinstance(schema, Mapping):
            self.problems.append(
                "response_format.json_schema.schema: expected a JSON schema (an object), found "
                f"{kind_of(schema)}"
            )
            return None
        text, problems = bounded(schema, room)
        self.problems += [f"response_format.json_schema.schema: {problem}" for problem in problems]
        return text

    def unsupported(self) -> None:
        """Note fields that no model of this project can honour."""
        if self.row.get("tools"):
            self.problems.append("tools: this model calls no tools; leave the field out")


def text_problems(where: str, text: str) -> Iterator[str]:
    """Yield what makes a text unfit for a tokenizer."""
    at = text.find("\0")
    if at >= 0:
        yield f"{where}: holds a NUL character at position {at}"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        yield f"{where}: holds a lone surrogate (half a character) at position {error.start}"


def shown(value: Any) -> str:
    """Show a value in a message, shortened."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def kind_of(value: Any) -> str:
    """Name the kind of a value as a message does, with the value where it is short."""
    names = {
        type(None): "nothing",
        bool: "true or false",
        str: "a text",
        list: "a list",
        dict: "an object",
    }
    kind = names.get(type(value), type(value).__name__)
    return f"{kind} ({shown(value)})" if isinstance(value, str | int | float) else kind
