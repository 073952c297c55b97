"""What a training row is: a conversation that ends with the assistant, in one of four formats.

    messages            [{"role": "user", "content": "..."}, {"role": "assistant", ...}]
    prompt_completion   prompt and completion, each a text or a list of messages
    sharegpt            conversations: [{"from": "human", "value": "..."}, {"from": "gpt", ...}]
    alpaca              instruction, input (may be left out), output

The last three may have a column `system` as well, and all of them a column `check`: how an answer
of the model's own to the row is checked, as in a file of questions. In CSV, and wherever a format
cannot nest, `messages`, `conversations` and `check` are JSON text in one cell, and `prompt` and
`completion` are texts.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from phi3_mlflow.rows.faults import NOTHING
from phi3_mlflow.rows.strict_json import read_json

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from phi3_mlflow.rows.faults import FaultList
    from phi3_mlflow.rows.records import Record

Role = Literal["system", "user", "assistant"]

CHECK = "check"
"""The column, of every format, that says how an answer is checked."""

_ROLES: Mapping[str, Role] = {role: role for role in get_args(Role)}
_SHAREGPT_ROLES: Mapping[str, Role] = {**_ROLES, "human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Message:
    """What one side says."""

    role: Role
    content: str


@dataclass(frozen=True)
class Conversation:
    """One training row.

    Attributes:
        id: sha256 of what is said and by whom, as hex; equal for equal conversations.
        messages: at most one of the system, then user and assistant in turn, the assistant last.
        where: its place in the file, as in `line 12`, for messages.
        check: how an answer to it is checked, a JSON object; None where the row does not say.
    """

    id: str
    messages: tuple[Message, ...]
    where: str
    check: Mapping[str, Any] | None = field(default=None, compare=False)

    @classmethod
    def of(
        cls,
        messages: Sequence[Message],
        where: str = "",
        check: Mapping[str, Any] | None = None,
    ) -> Conversation:
        """The conversation of these messages, with its id."""
        said = [[message.role, message.content] for message in messages]
        text = json.dumps(said, ensure_ascii=True, separators=(",", ":"))
        return cls(hashlib.sha256(text.encode("ascii")).hexdigest(), tuple(messages), where, check)


@dataclass(frozen=True)
class Format:
    """How a row writes a conversation down.

    Attributes:
        name: what it is called in the settings.
        needed: the columns that a row must have, and that it is recognised by.
        read: the messages of a row; what is wrong goes into the row's faults.
        optional: further columns that are read.
    """

    name: str
    needed: tuple[str, ...]
    read: Callable[[_Row], list[Message]]
    optional: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that is read."""
        return (*self.needed, *self.optional, CHECK)


@dataclass
class _Row:
    """A row's values and the faults that are found in them, each with its field."""

    values: dict[str, Any]
    faults: list[tuple[str, Any, str]] = field(default_factory=list)

    def add(self, name: str, found: Any, reason: str) -> None:
        self.faults.append((name, found, reason))

    def text(self, name: str) -> str:
        """A column's text."""
        return self.text_of(name, self.values.get(name, NOTHING))

    def text_of(self, name: str, value: Any) -> str:
        """A value that should be a text which says something."""
        if value is NOTHING:
            self.add(name, NOTHING, "is missing")
        elif not isinstance(value, str):
            self.add(name, value, "should be a text")
        elif not value.strip():
            self.add(name, value, "should not be empty")
        elif any("\ud800" <= letter <= "\udfff" for letter in value):
            self.add(name, value, "holds half a surrogate pair, which is no text")
        else:
            return value
        return ""

    def system(self) -> list[Message]:
        """The message of the column `system`, where a row has one."""
        if self.values.get("system") in (None, ""):
            return []
        return [Message("system", self.text("system"))]

    def check(self) -> dict[str, Any] | None:
        """The object of the column `check`, where a row has one."""
        value = self.values.get(CHECK)
        if value in (None, ""):
            return None
        try:
            value = read_json(value) if isinstance(value, str) else value
            json.dumps(value, allow_nan=False)  # Parquet has more types than JSON
        except (TypeError, ValueError, RecursionError) as error:
            self.add(CHECK, value, f"should be an object; as JSON: {error}")
            return None
        if isinstance(value, dict):
            return value
        self.add(CHECK, value, "should be an object, as in a file of questions")
        return None

    def messages(
        self,
        name: str,
        keys: tuple[str, str] = ("role", "content"),
        roles: Mapping[str, Role] = _ROLES,
    ) -> list[Message]:
        """The messages of a column that holds a list of them.

        Args:
            name: the column.
            keys: what a message calls its role and its content.
            roles: how a role may be written, and which one that is.
        """
        value = self.values.get(name, NOTHING)
        if isinstance(value, str):
            try:
                value = read_json(value)
            except (ValueError, RecursionError) as error:
                self.add(name, value, f"should be a list of messages; as JSON: {error}")
                return []
        if value is NOTHING:
            self.add(name, NOTHING, "is missing")
            return []
        if not isinstance(value, list) or not value:
            self.add(name, value, "should be a list of messages")
            return []
        found = (self._message(f"{name}[{i}]", m, keys, roles) for i, m in enumerate(value))
        return [message for message in found if message]

    def _message(
        self, name: str, value: Any, keys: tuple[str, str], roles: Mapping[str, Role]
    ) -> Message | None:
        role_key, content_key = keys
        if not isinstance(value, dict):
            self.add(name, value, f"should be an object with {role_key} and {content_key}")
            return None
        for key in value:
            if key not in keys and value[key] is not None:
                told = f"unknown key; a message has {role_key} and {content_key}"
                self.add(f"{name}.{key}", value[key], told)
        role = value.get(role_key, NOTHING)
        content = self.text_of(f"{name}.{content_key}", value.get(content_key, NOTHING))
        if isinstance(role, str) and role in roles:
            return Message(roles[role], content)
        if role is NOTHING:
            self.add(f"{name}.{role_key}", NOTHING, "is missing")
        else:
            self.add(f"{name}.{role_key}", role, f"unknown role; allowed are {', '.join(roles)}")
        return None


def _messages(row: _Row) -> list[Message]:
    return row.messages("messages")


def _prompt_completion(row: _Row) -> list[Message]:
    messages = row.system()
    for name, role in (("prompt", _ROLES["user"]), ("completion", _ROLES["assistant"])):
        if isinstance(row.values.get(name), list):
            messages += row.messages(name)
        else:
            messages.append(Message(role, row.text(name)))
    return messages


def _sharegpt(row: _Row) -> list[Message]:
    return row.system() + row.messages("conversations", ("from", "value"), _SHAREGPT_ROLES)


def _alpaca(row: _Row) -> list[Message]:
    asked, more = row.text("instruction"), row.values.get("input")
    if more not in (None, ""):
        asked += "\n\n" + row.text("input")
    return [*row.system(), Message("user", asked), Message("assistant", row.text("output"))]


FORMATS: Mapping[str, Format] = {
    known.name: known
    for known in (
        Format("messages", ("messages",), _messages),
        Format("prompt_completion", ("prompt", "completion"), _prompt_completion, ("system",)),
        Format("sharegpt", ("conversations",), _sharegpt, ("system",)),
        Format("alpaca", ("instruction", "output"), _alpaca, ("input", "system")),
    )
}
"""Name to format, for the setting `format`."""


def recognised(columns: Collection[str]) -> list[Format]:
    """The formats whose columns are all there."""
    return [known for known in FORMATS.values() if set(known.needed) <= set(columns)]


def read_conversation(record: Record, known: Format, faults: FaultList) -> Conversation | None:
    """The conversation that a row holds.

    Args:
        record: a row that could be read.
        known: the format that it is in.
        faults: gets what is wrong with it, every fault with its place and field.

    Returns:
        The conversation; None when something is wrong with it.
    """
    row = _Row(record.values)
    messages = known.read(row)
    if not row.faults:
        row.faults += _out_of_turn(known.needed[0], messages)
    check = row.check()
    for name, found, reason in row.faults:
        faults.add(record.where, name, found, reason)
    return None if row.faults else Conversation.of(messages, record.where, check)


def _out_of_turn(name: str, messages: Sequence[Message]) -> Iterator[tuple[str, Any, str]]:
    """What is wrong with the order of the messages."""
    turns = [message.role for message in messages]
    if turns[0] == "system":
        turns = turns[1:]
    for number, role in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if role != expected:
            told = f"message {number + 1 + len(messages) - len(turns)} should be of the {expected}"
            if role == "system":
                told += "; one message of the system may stand at the beginning"
            yield name, role, f"{told}: user and assistant take turns, beginning with the user"
            return
    if not turns or turns[-1] != "assistant":
        last = messages[-1].role
        yield name, last, "the last message should be of the assistant: it is what is learnt"
