from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3_mlflow.runtime.request import (
    RequestError,
    SamplingDefaults,
    input_rows,
    parse_chat,
    parse_prompt,
)

CONTEXT = 1000
USER = [{"role": "user", "content": "Hello"}]


def _problems(**fields: Any) -> list[str]:
    with pytest.raises(RequestError) as caught:
        parse_chat({"messages": USER, **fields}, SamplingDefaults(), CONTEXT)
    return caught.value.problems


@pytest.mark.parametrize(
    ("fields", "start"),
    [
        ({"messages": []}, "messages: the list is empty"),
        ({"messages": None}, "messages: expected a list of messages, found nothing"),
        ({"messages": "hi"}, "messages: expected a list of messages, found a text"),
        ({"messages": ["hi"]}, "messages[0]: expected an object"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role: 'robot' is not"),
        ({"messages": [{"content": "a"}]}, "messages[0].role: None is not"),
        ({"messages": [*USER, {"role": "user"}]}, "messages[1].content: expected a text, found no"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content: expected a text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
            "messages[0].content: expected a text, found a list",
        ),
        ({"messages": [{"role": "user", "content": "a\0b"}]}, "messages[0].content: holds a NUL"),
        (
            {"messages": [{"role": "user", "content": "a\ud800"}]},
            "messages[0].content: holds a lone surrogate (half a character) at position 1",
        ),
        (
            {"messages": [{"role": "user", "content": "x" * 10_000_000}]},
            "messages: 10000000 characters of text cannot fit",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]},
            "messages[0].tool_calls: not supported",
        ),
        ({"max_tokens": 0}, "max_tokens: 0 is below 1"),
        ({"max_tokens": -3}, "max_tokens: -3 is below 1"),
        ({"max_tokens": CONTEXT + 1}, "max_tokens: 1001 is above 1000"),
        ({"max_tokens": True}, "max_tokens: expected a whole number"),
        ({"max_tokens": 1.5}, "max_tokens: expected a whole number"),
        ({"temperature": -0.1}, "temperature: -0.1 is not between 0 and 2"),
        ({"temperature": float("inf")}, "temperature: inf is not between"),
        ({"temperature": "hot"}, "temperature: expected a number, found a text"),
        ({"top_p": 1.1}, "top_p: 1.1 is not between 0 and 1"),
        ({"top_k": -1}, "top_k: -1 is below 0"),
        ({"n": 0}, "n: 0 is below 1"),
        ({"seed": -1}, "seed: -1 is below 0"),
        ({"seed": 2**63}, "seed: 9223372036854775808 is above"),
        ({"custom_inputs": {"seed": "x"}}, "custom_inputs.seed: expected a whole number"),
        ({"custom_inputs": 5}, "custom_inputs: expected an object"),
        ({"stop": [""]}, "stop[0]: expected a text of at least one character"),
        ({"stop": ["a", 5]}, "stop[1]: expected a text"),
        ({"stop": 5}, "stop: expected a text or a list of texts"),
        ({"frequency_penalty": 3.0}, "frequency_penalty: 3.0 is not between -2 and 2"),
        ({"tools": [{"type": "function"}]}, "tools: this model calls no tools"),
        ({"stream": "yes"}, "stream: expected true or false"),
    ],
)
def test_a_bad_request_is_refused_by_the_name_of_the_field(fields: Any, start: str) -> None:
    (problem,) = _problems(**fields)
    assert problem.startswith(start)
    assert len(problem) < 200, "an error does not repeat the request"


def test_everything_that_is_wrong_is_named_at_once() -> None:
    problems = _problems(temperature=-1, max_tokens=0, stop=[""], n=0)
    assert [p.partition(":")[0] for p in problems] == ["temperature", "max_tokens", "n", "stop[0]"]


def test_unknown_fields_are_ignored() -> None:
    request = parse_chat({"messages": USER, "logit_bias": {"5": 3}}, SamplingDefaults(), CONTEXT)
    assert request.messages == USER


def test_what_a_request_leaves_out_has_defaults() -> None:
    request = parse_chat({"messages": USER}, SamplingDefaults(temperature=0.3, top_p=0.8), CONTEXT)
    assert (request.sampling.temperature, request.sampling.top_p) == (0.3, 0.8)
    assert (request.max_tokens, request.n, request.stop) == (None, 1, ())


def test_seeds_come_from_the_field_before_custom_inputs() -> None:
    both = {"messages": USER, "seed": 1, "custom_inputs": {"seed": 2}}
    assert parse_chat(both, SamplingDefaults(), CONTEXT).sampling.seed == 1
    del both["seed"]
    assert parse_chat(both, SamplingDefaults(), CONTEXT).sampling.seed == 2
    del both["custom_inputs"]
    seeds = {parse_chat(both, SamplingDefaults(), CONTEXT).sampling.seed for _ in range(5)}
    assert len(seeds) == 5


def test_rows_of_a_data_frame_lose_what_is_absent_and_numpy_types() -> None:
    frame = pd.DataFrame(
        {
            "messages": [USER, np.array(USER, dtype=object)],
            "temperature": [0.5, float("nan")],
            "stop": [None, np.array(["x"])],
            "max_tokens": np.array([3, 4]),
        }
    )
    first, second = input_rows(frame)
    assert first == {"messages": USER, "temperature": 0.5, "max_tokens": 3}
    assert second == {"messages": USER, "stop": ["x"], "max_tokens": 4}


@pytest.mark.parametrize("wrong", [5, None, [5], object()])
def test_input_that_is_no_request_is_refused(wrong: Any) -> None:
    with pytest.raises(RequestError, match="request: expected an object"):
        input_rows(wrong)


@pytest.mark.parametrize(
    ("prompt", "start"),
    [(None, "prompt: expected a text"), ("", "prompt: expected a text"), ("a\0", "prompt: holds")],
)
def test_a_bad_prompt_is_refused(prompt: Any, start: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_prompt({"prompt": prompt}, SamplingDefaults(), CONTEXT)
    assert caught.value.problems[0].startswith(start)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
_fields = """messages temperature top_p top_k max_tokens stop n seed stream tools custom_inputs
    frequency_penalty presence_penalty prompt other"""
_names = st.sampled_from(_fields.split())
_message = st.fixed_dictionaries({"role": _json, "content": _json})


@given(st.dictionaries(_names, _json | st.lists(_message, max_size=3), max_size=6))
def test_whatever_is_asked_is_answered_or_refused_by_name(row: dict[str, Any]) -> None:
    for parse in (parse_chat, parse_prompt):
        for clean in input_rows([row]):
            problems: list[str] = []
            try:
                request = parse(clean, SamplingDefaults(), CONTEXT)
            except RequestError as error:
                problems = error.problems
            if problems:
                assert all(":" in problem for problem in problems)
            else:
                assert request.messages or request.prompt
                assert request.max_tokens is None or 1 <= request.max_tokens <= CONTEXT
                assert 0 <= request.sampling.temperature <= 2
