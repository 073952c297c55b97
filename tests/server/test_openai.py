"""The official client against the server: what it asks for, what it gets, what it is told."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from phi3_mlflow.server.guard import log_failure
from tests.server.conftest import Running, scripted

HELLO: Any = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with scripted("Good day to you.") as up:
        yield up


def test_a_chat(server: Running) -> None:
    answer = server.openai().chat.completions.create(model="m", messages=HELLO)
    assert answer.choices[0].message.content == "Good day to you."
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.model, answer.object) == ("m", "chat.completion")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (7, 17)


def test_every_answer_says_which_version_made_it(server: Running) -> None:
    client = server.openai()
    raw = client.chat.completions.with_raw_response.create(model="m", messages=HELLO)
    assert raw.headers["x-model-version"] == "1"
    assert raw.headers["x-request-id"].startswith("req-")
    assert server.http().get("/v1/models").headers["x-model-version"] == "1"


def test_a_stream_says_the_same_in_pieces(server: Running) -> None:
    stream = server.openai().chat.completions.create(
        model="m", messages=HELLO, n=2, stream=True, stream_options={"include_usage": True}
    )
    texts, reasons, last = ["", ""], {}, None
    pieces = 0
    for chunk in stream:
        last = chunk
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            pieces += bool(choice.delta.content)
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == ["Good day to you."] * 2
    assert reasons == {0: "stop", 1: "stop"}
    assert pieces == 32
    assert last is not None
    assert last.usage is not None
    assert last.usage.completion_tokens == 34


def test_a_stream_is_server_sent_events_to_the_letter(server: Running) -> None:
    body = {"messages": HELLO, "stream": True, "max_tokens": 1}
    answer = server.http().post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, done, nothing = answer.text.split("\n\n")
    assert (done, nothing) == ("data: [DONE]", "")
    assert all(event.startswith("data: {") for event in events)
    assert "usage" not in answer.text, "it was not asked for"


@pytest.mark.parametrize(
    ("more", "text", "reason"),
    [
        ({"stop": "day"}, "Good ", "stop"),
        ({"stop": ["you", "to"]}, "Good day ", "stop"),
        ({"max_tokens": 4}, "Good", "length"),
        ({"max_completion_tokens": 4}, "Good", "length"),
        ({"n": 1, "seed": 5, "temperature": 0, "user": "u", "tool_choice": "none"},
         "Good day to you.", "stop"),
        ({"response_format": {"type": "text"}}, "Good day to you.", "stop"),
    ],
)  # fmt: skip
def test_parameters(server: Running, more: dict[str, Any], text: str, reason: str) -> None:
    for streamed in (False, True):
        answer: Any = server.openai().chat.completions.create(
            model="m", messages=HELLO, stream=streamed, **more
        )
        if streamed:
            chunks = [chunk.choices[0] for chunk in answer]
            said = "".join(chunk.delta.content or "" for chunk in chunks)
            assert (said, chunks[-1].finish_reason) == (text, reason)
        else:
            choice = answer.choices[0]
            assert (choice.message.content, choice.finish_reason) == (text, reason)


def test_text_parts_and_developers_are_what_the_contract_calls_them(server: Running) -> None:
    messages: Any = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": part} for part in ("Hel", "lo")]},
    ]
    answer = server.openai().chat.completions.create(model="m", messages=messages)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len("sBe kind.") + 1 + len("uHello") + 1


def test_log_probabilities_follow_the_text(server: Running) -> None:
    whole = server.openai().chat.completions.create(
        model="m", messages=HELLO, logprobs=True, top_logprobs=2, stop=["to"]
    )
    assert whole.choices[0].logprobs is not None
    found = whole.choices[0].logprobs.content or []
    assert "".join(token.token for token in found) == "Good day ", "none of the stop text"
    assert all(token.logprob <= 0 for token in found)
    assert all(token.top_logprobs[0].token == token.token for token in found), "it is greedy"
    assert all(len(token.top_logprobs) == 2 for token in found)
    assert bytes(found[0].bytes or []) == b"G"
    streamed = server.openai().chat.completions.create(
        model="m", messages=HELLO, logprobs=True, top_logprobs=2, stop=["to"], stream=True
    )
    pieces = [
        token
        for chunk in streamed
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content or []
    ]
    assert pieces == found


def test_completions_of_a_literal_prompt(server: Running) -> None:
    client = server.openai()
    answer = client.completions.create(model="m", prompt="Hello", logprobs=1, n=2, max_tokens=4)
    assert [choice.text for choice in answer.choices] == ["Good", "Good"]
    assert answer.object == "text_completion"
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.tokens == ["G", "o", "o", "d"]
    assert answer.choices[0].logprobs.text_offset == [0, 1, 2, 3]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 5, "no template"
    streamed = client.completions.create(model="m", prompt=["Hello"], stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == "Good day to you."


def test_models(server: Running) -> None:
    assert [model.id for model in server.openai().models.list()] == ["m"]


@pytest.mark.parametrize(
    ("more", "param", "words"),
    [
        ({"messages": []}, "messages", "the list is empty"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role", "'robot'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
         "messages[0].content", "expected a text"),
        ({"temperature": 3}, "temperature", "not between 0 and 2"),
        ({"max_tokens": 0}, "max_tokens", "below 1"),
        ({"max_tokens": 199}, "max_tokens", "beyond the context"),
        ({"n": 1000}, "n", "above 128"),
        ({"seed": "x"}, "seed", "expected a whole number"),
        ({"logprobs": 1}, "logprobs", "true or false"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "above 20"),
        ({"logit_bias": {"5": 3}}, "logit_bias", "not supported"),
        ({"tools": [{"type": "function"}]}, "tools", "calls no tools"),
        ({"response_format": {"type": "xml"}}, "response_format", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema", ""),
        ({"response_format": {"type": "json_object"}}, "response_format", "no schema"),
        ({"stream": "yes"}, "stream", "boolean"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "only with stream"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_completion_tokens", "not both"),
    ],
)  # fmt: skip
def test_bad_requests_name_the_field(
    server: Running, more: dict[str, Any], param: str, words: str
) -> None:
    answer = server.http().post("/v1/chat/completions", json={"messages": HELLO, **more})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
    assert error["param"] == param
    assert words in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_a_prompt_beyond_the_context_has_openais_code(server: Running) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.openai().chat.completions.create(
            model="m", messages=[{"role": "user", "content": "x" * 250}], stream=True
        )
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("send", "status", "code"),
    [
        ({"content": b"{bad"}, 400, "invalid_json"),
        ({"content": b"[]"}, 400, "invalid_json"),
        ({"content": b"\xff\xfe"}, 400, "invalid_json"),
        ({"content": b"[" * 100_000}, 400, "invalid_json"),
        ({"content": b"{}", "headers": {"Content-Type": "text/plain"}}, 415,
         "unsupported_media_type"),
        ({"json": {"messages": HELLO, "model": "gpt-9"}}, 404, "model_not_found"),
    ],
)  # fmt: skip
def test_bodies_that_are_no_requests(
    server: Running, send: dict[str, Any], status: int, code: str
) -> None:
    send.setdefault("headers", {"Content-Type": "application/json"})
    answer = server.http().post("/v1/chat/completions", **send)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_unknown_doors_and_methods_have_the_same_shape(server: Running) -> None:
    for method, path, status in (("GET", "/v1/nope", 404), ("GET", "/v1/completions", 405)):
        answer = server.http().request(method, path)
        assert (answer.status_code, answer.json()["error"]["type"]) == (
            status, "invalid_request_error",
        )  # fmt: skip
    assert server.metric('phi3_requests_total{endpoint="other",status="404"}') >= 1


def test_what_breaks_inside_stays_inside(capfd: pytest.CaptureFixture[str], caplog: Any) -> None:
    def explode(tokens: Any) -> None:
        raise RuntimeError("secret prompt in /home/somebody/model.onnx")

    with scripted("abc", on_extend=explode) as up:
        for streamed in (False, True):
            answer = up.http().post(
                "/v1/chat/completions", json={"messages": HELLO, "stream": streamed}
            )
            assert '"type":"server_error"' in answer.text
            assert "secret" not in answer.text
            assert "/home" not in answer.text
            assert answer.status_code == 500 or streamed, "a stream has begun when it breaks"
    heard = caplog.text + "".join(capfd.readouterr())
    assert "RuntimeError in test_openai:" in heard, "the log says what kind of error, and where"
    assert "secret" not in heard
    assert "Traceback" not in heard
    assert "Hello" not in heard


def test_with_debug_the_log_has_the_traceback(caplog: Any) -> None:
    try:
        raise RuntimeError("the whole story")
    except RuntimeError as error:
        log_failure(error, "req-1", debug=True)
    assert "the whole story" in caplog.text
    assert "Traceback" in caplog.text


def test_metrics_count_what_happened() -> None:
    with scripted("Good day.") as up:
        client = up.openai()
        client.chat.completions.create(model="m", messages=HELLO)
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="m", messages=[])
        assert up.metric('phi3_tokens_total{kind="completion",version="1"}') == 10
        assert up.metric('phi3_tokens_total{kind="prompt",version="1"}') == 7
        door = 'endpoint="/v1/chat/completions"'
        assert up.metric(f'phi3_requests_total{{{door},status="200"}}') == 1
        assert up.metric(f'phi3_requests_total{{{door},status="400"}}') == 1
        assert up.metric("phi3_time_to_first_token_seconds_count") == 1
        assert up.metric("phi3_tokens_per_second_count") == 1
        assert up.metric('phi3_model_info{name="m",version="1"}') == 1
        assert up.metric("phi3_running") == up.metric("phi3_waiting") == 0


def test_ping_health_and_version(server: Running) -> None:
    import mlflow

    http = server.http()
    assert [http.get(path).status_code for path in ("/ping", "/health")] == [200, 200]
    assert http.get("/version").text == mlflow.__version__


def test_a_body_in_pieces_without_a_length(server: Running) -> None:
    pieces = iter([b'{"messages": [{"role": "user", ', b'"content": "Hi"}]}'])
    answer = httpx.post(
        f"{server.url}/v1/chat/completions", content=pieces,
        headers={"Content-Type": "application/json"},
    )  # fmt: skip
    assert answer.json()["choices"][0]["message"]["content"] == "Good day to you."


def test_a_model_can_be_asked_for_by_name(server: Running) -> None:
    client = server.openai()
    assert client.models.retrieve("m").id == "m"
    assert server.http().get("/v1/models/models:/m@champion").json()["id"] == "m"
    with pytest.raises(openai.NotFoundError, match="this is m"):
        client.models.retrieve("other")


def test_tools_that_are_not_to_be_used_are_none(server: Running) -> None:
    tools: Any = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    client = server.openai()
    answer = client.chat.completions.create(
        model="m", messages=HELLO, tools=tools, tool_choice="none"
    )
    assert answer.choices[0].message.content == "Good day to you."
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(model="m", messages=HELLO, tools=tools)


def test_several_prompts_are_answered_in_turn(server: Running) -> None:
    client = server.openai()
    answer = client.completions.create(model="m", prompt=["one", "two"], n=2, max_tokens=4)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert {choice.text for choice in answer.choices} == {"Good"}
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 16)
    stream = client.completions.create(
        model="m", prompt=["one", "two"], max_tokens=4, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    texts, last = ["", ""], None
    for last in stream:
        for choice in last.choices:
            texts[choice.index] += choice.text
    assert texts == ["Good", "Good"]
    assert last is not None
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (6, 8)
    with pytest.raises(openai.BadRequestError, match="at most 128"):
        client.completions.create(model="m", prompt=["x"] * 65, n=2)


@pytest.mark.parametrize("name", [
    "temperature", "top_p", "top_k", "max_tokens", "max_completion_tokens", "stop", "n", "seed",
    "stream", "stream_options", "logprobs", "top_logprobs", "response_format", "tools",
    "tool_choice", "presence_penalty", "frequency_penalty", "custom_inputs", "model", "logit_bias",
])  # fmt: skip
def test_null_is_not_given(server: Running, name: str) -> None:
    answer = server.http().post("/v1/chat/completions", json={"messages": HELLO, name: None})
    assert answer.status_code == 200, answer.text


def test_null_is_not_given_inside_either(server: Running) -> None:
    asked = {
        "messages": [{**HELLO[0], "refusal": None, "tool_calls": None, "name": None}],
        "custom_inputs": {"seed": None},
        "stream": True,
        "stream_options": {"include_usage": None},
    }
    assert server.http().post("/v1/chat/completions", json=asked).status_code == 200


def test_an_image_is_named(server: Running) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]
    answer = server.http().post(
        "/v1/chat/completions", json={"messages": [{"role": "user", "content": parts}]}
    )
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "messages[0].content")
    assert "a part of type 'image_url' at [1]; this model takes text only" in error["message"]
