"""Whatever a body holds, it is read or refused with the field's name; never a fault."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3_mlflow.runtime.openai_request import chat_row, completion_row
from phi3_mlflow.server.errors import ApiError, from_exception
from phi3_mlflow.server.protocol import read_envelope
from tests.runtime.scripted import ScriptedEngine, model_on

LIVE = model_on(ScriptedEngine("x")).live()
FIELDS = (
    "model", "messages", "prompt", "stream", "stream_options", "temperature", "top_p", "top_k", "n",
    "stop", "seed", "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs",
    "response_format", "tools", "tool_choice", "logit_bias", "custom_inputs", "echo", "suffix",
    "best_of", "presence_penalty", "user", "unknown",
)  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(("role", "content", "type", "text", "json_schema", "schema", "seed"))
            | st.text(max_size=5),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
GOOD = [{"role": "user", "content": "Hello"}]


def _refusal(row: Any, body: bytes, contract: str) -> ApiError | None:
    """What the sender of a body is told, or nothing when it is a request."""
    try:
        LIVE.parse(row(read_envelope(body).content()), contract)
    except Exception as error:
        return from_exception(error)
    return None


def _answerable(row: Any, body: bytes, contract: str) -> bool:
    """Whether the body is a request; when it is not, its sender is told so in a proper way."""
    told = _refusal(row, body, contract)
    if told is not None:
        assert 400 <= told.status < 500, told.message
        assert told.message
        json.dumps(told.body())
    return told is None


@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=8), st.booleans())
def test_any_object(content: dict[str, Any], good_messages: bool) -> None:
    if good_messages:
        content = {**content, "messages": GOOD, "prompt": "Hello"}
    body = json.dumps(content).encode()
    _answerable(chat_row, body, "chat")
    _answerable(completion_row, body, "prompt")


@given(st.binary(max_size=200))
def test_any_bytes(body: bytes) -> None:
    assert not _answerable(chat_row, body, "chat")


@given(st.sampled_from(FIELDS), JSON)
def test_one_field_beside_a_good_request(name: str, value: Any) -> None:
    content = {"messages": GOOD, name: value}
    told = _refusal(chat_row, json.dumps(content).encode(), "chat")
    field = name.removeprefix("max_completion_") if "tokens" in name else name
    assert told is None or field in told.message, "the message names the field"


def test_a_good_request_is_answerable() -> None:
    assert _answerable(chat_row, json.dumps({"messages": GOOD}).encode(), "chat")
    assert _answerable(completion_row, json.dumps({"prompt": "Hello"}).encode(), "prompt")


def test_values_are_not_repeated_in_errors_of_openais_own_fields() -> None:
    with pytest.raises(ApiError) as caught:
        read_envelope(b'{"stream": "my secret text", "messages": []}')
    assert "secret" not in caught.value.message
