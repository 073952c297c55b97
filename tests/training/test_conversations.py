"""Formats of training rows: the same conversation out of each, and every fault with its field."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3_mlflow.rows.faults import FaultList
from phi3_mlflow.rows.records import Record
from phi3_mlflow.training.conversations import (
    FORMATS,
    Conversation,
    Message,
    read_conversation,
    recognised,
)

SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt"}


@st.composite
def conversations(draw: st.DrawFn, most_turns: int = 3) -> Conversation:
    """Conversations of one to some turns, with and without a message of the system."""
    said = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
    messages = [Message("system", draw(said))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, most_turns))):
        messages += [Message("user", draw(said)), Message("assistant", draw(said))]
    return Conversation.of(messages, "line 1")


def as_messages(conversation: Conversation) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in conversation.messages]


def as_sharegpt(messages: tuple[Message, ...]) -> list[dict[str, str]]:
    return [{"from": SHAREGPT[m.role], "value": m.content} for m in messages]


def written(conversation: Conversation) -> list[tuple[str, dict[str, Any]]]:
    """A conversation in every format that can hold it, under the format's name."""
    messages = as_messages(conversation)
    rows: list[tuple[str, dict[str, Any]]] = [
        ("messages", {"messages": messages}),
        ("messages", {"messages": json.dumps(messages)}),
        ("prompt_completion", {"prompt": messages[:-1], "completion": messages[-1:]}),
        ("prompt_completion", {"prompt": messages[:-1], "completion": messages[-1]["content"]}),
        ("sharegpt", {"conversations": as_sharegpt(conversation.messages)}),
        ("sharegpt", {"conversations": json.dumps(as_sharegpt(conversation.messages))}),
    ]
    system = [m.content for m in conversation.messages if m.role == "system"]
    rest = conversation.messages[len(system) :]
    also = {"system": system[0]} if system else {}
    rows.append(("sharegpt", {**also, "conversations": as_sharegpt(rest)}))
    if len(rest) == 2:
        asked, answered = rest[0].content, rest[1].content
        rows.append(("prompt_completion", {**also, "prompt": asked, "completion": answered}))
        rows.append(("alpaca", {**also, "instruction": asked, "output": answered}))
        rows.append(("alpaca", {**also, "instruction": asked, "input": "", "output": answered}))
        first, _, more = asked.partition("\n\n")
        if first.strip() and more.strip():
            rows.append(
                ("alpaca", {**also, "instruction": first, "input": more, "output": answered})
            )
    return rows


@given(conversations())
def test_a_conversation_reads_back_the_same_from_every_format(conversation: Conversation) -> None:
    for name, row in written(conversation):
        assert [known.name for known in recognised(row)] == [name]
        faults = FaultList()
        assert read_conversation(Record("line 1", row), FORMATS[name], faults) == conversation
        assert not faults


@given(conversations(), conversations())
def test_the_id_tells_conversations_apart(one: Conversation, other: Conversation) -> None:
    assert (one.id == other.id) == (one.messages == other.messages)
    assert Conversation.of(one.messages, "line 7").id == one.id


def test_the_input_of_alpaca_follows_its_instruction() -> None:
    row = {"instruction": "Translate.", "input": "Good morning", "output": "Guten Morgen"}
    read = read_conversation(Record("line 1", row), FORMATS["alpaca"], FaultList())
    assert read is not None
    assert read.messages == (
        Message("user", "Translate.\n\nGood morning"),
        Message("assistant", "Guten Morgen"),
    )


USER, ASSISTANT, SYSTEM = (
    {"role": role, "content": "x"} for role in ("user", "assistant", "system")
)


@pytest.mark.parametrize(
    ("name", "row", "told"),
    [
        ("messages", {}, "messages: is missing"),
        ("messages", {"messages": []}, "messages: found []; should be a list of messages"),
        ("messages", {"messages": 5}, "messages: found 5; should be a list of messages"),
        ("messages", {"messages": "[{"}, "should be a list of messages; as JSON: "),
        ("messages", {"messages": ["x"]}, "messages[0]: found 'x'; should be an object with role"),
        ("messages", {"messages": [{"role": "user"}]}, "messages[0].content: is missing"),
        ("messages", {"messages": [{"content": "x"}]}, "messages[0].role: is missing"),
        (
            "messages",
            {"messages": [USER, {"role": "tool", "content": "x"}]},
            "messages[1].role: found 'tool'; unknown role; allowed are system, user, assistant",
        ),
        (
            "messages",
            {"messages": [USER, {"role": "assistant", "content": " \n"}]},
            "messages[1].content: found ' \\n'; should not be empty",
        ),
        (
            "messages",
            {"messages": [USER, {"role": "assistant", "content": ["x"]}]},
            "messages[1].content: found ['x']; should be a text",
        ),
        (
            "messages",
            {"messages": [USER, {"role": "assistant", "content": "\ud800"}]},
            "half a surrogate pair",
        ),
        (
            "messages",
            {"messages": [USER, {**ASSISTANT, "weight": 0}]},
            "messages[1].weight: found 0; unknown key; a message has role and content",
        ),
        (
            "messages",
            {"messages": [USER, USER, ASSISTANT]},
            "messages: found 'user'; message 2 should be of the assistant: user and assistant take",
        ),
        (
            "messages",
            {"messages": [SYSTEM, ASSISTANT]},
            "messages: found 'assistant'; message 2 should be of the user",
        ),
        (
            "messages",
            {"messages": [USER, ASSISTANT, SYSTEM, USER, ASSISTANT]},
            "message 3 should be of the user; one message of the system may stand at the beginning",
        ),
        (
            "messages",
            {"messages": [USER, ASSISTANT, USER]},
            "messages: found 'user'; the last message should be of the assistant",
        ),
        ("messages", {"messages": [SYSTEM]}, "the last message should be of the assistant"),
        ("prompt_completion", {"prompt": "x"}, "completion: is missing"),
        (
            "prompt_completion",
            {"prompt": 7, "completion": "x"},
            "prompt: found 7; should be a text",
        ),
        (
            "prompt_completion",
            {"prompt": "x", "completion": ""},
            "completion: found ''; should not",
        ),
        (
            "prompt_completion",
            {"prompt": [SYSTEM, USER], "system": "y", "completion": "x"},
            "prompt: found 'system'; message 2 should be of the user",
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "bing", "value": "x"}]},
            "conversations[0].from: found 'bing'; unknown role; allowed are system, user, "
            "assistant, human, gpt",
        ),
        ("alpaca", {"instruction": "x", "output": "  "}, "output: found '  '; should not be empty"),
        ("alpaca", {"instruction": "x", "output": "y", "input": 3}, "input: found 3; should be a"),
        (
            "alpaca",
            {"instruction": "x", "output": "y", "check": [1]},
            "check: found [1]; should be",
        ),
        ("messages", {"messages": [USER, ASSISTANT], "check": "{"}, "should be an object; as JSON"),
        ("messages", {"messages": [USER, ASSISTANT], "check": {"x": b""}}, "object; as JSON: "),
    ],
)
def test_what_is_wrong_with_a_row_is_said_with_its_field(
    name: str, row: dict[str, Any], told: str
) -> None:
    faults = FaultList()
    assert read_conversation(Record("line 3", row), FORMATS[name], faults) is None
    assert len(faults) == 1, faults
    assert faults[0].startswith("line 3: ")
    assert told in faults[0]


def test_several_faults_of_one_row_are_all_said() -> None:
    faults = FaultList()
    row = {"messages": [{"role": "robot", "content": ""}, {"role": "user"}]}
    read_conversation(Record("line 3", row), FORMATS["messages"], faults)
    fields = [fault.split(": ")[1] for fault in faults]
    assert fields == ["messages[0].content", "messages[0].role", "messages[1].content"]


def test_keys_of_a_message_that_hold_nothing_do_not_count() -> None:
    row = {"messages": [USER, {**ASSISTANT, "tool_calls": None}]}
    assert read_conversation(Record("line 1", row), FORMATS["messages"], FaultList())


@pytest.mark.parametrize("cell", [{"kind": "exact", "value": "x"}, '{"kind":"exact","value":"x"}'])
def test_a_check_is_read_in_every_format_and_tells_no_rows_apart(cell: Any) -> None:
    said = Conversation.of([Message("user", "a"), Message("assistant", "b")], "line 1")
    for name, row in written(said):
        faults = FaultList()
        read = read_conversation(Record("line 1", {**row, "check": cell}), FORMATS[name], faults)
        assert read is not None
        assert read.check == {"kind": "exact", "value": "x"}
        assert read == said
        assert "check" in FORMATS[name].columns


@pytest.mark.parametrize("cell", [None, ""])
def test_a_check_may_be_left_out(cell: Any) -> None:
    row = {"messages": [USER, ASSISTANT], "check": cell}
    read = read_conversation(Record("line 1", row), FORMATS["messages"], FaultList())
    assert read is not None
    assert read.check is None
