"""A row of a scored file may ask what a request to the server may ask."""

from __future__ import annotations

from typing import Any

import pytest

from phi3_mlflow.scoring.requests import request_of


@pytest.mark.parametrize(
    ("message", "asked"),
    [
        ({"role": "user", "content": "a"}, {"role": "user", "content": "a"}),
        ({"role": "developer", "content": "a"}, {"role": "system", "content": "a"}),
        (
            {"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]},
            {"role": "user", "content": "ab"},
        ),
        (
            {"role": "assistant", "content": "", "refusal": None, "tool_calls": [], "name": "n"},
            {"role": "assistant", "content": "", "name": "n"},
        ),
    ],
)
def test_messages_as_the_server_takes_them(message: dict[str, Any], asked: dict[str, str]) -> None:
    assert request_of(0, "line 1", {"messages": [message]}).body == {"messages": [asked]}


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "user", "content": [{"type": "image_url"}]}, "expected a text"),
        ({"role": "user", "content": "a", "tool_calls": [{"id": "1"}]}, "unknown fields"),
    ],
)
def test_others_are_refused(message: dict[str, Any], words: str) -> None:
    error = request_of(0, "line 1", {"messages": [message]}).error
    assert error is not None
    assert words in error
