"""Queue, cancellation, time, size, keys, and the end of a server."""

from __future__ import annotations

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from tests.server.conftest import Gate, Running, scripted, wait_for

HELLO: Any = [{"role": "user", "content": "Hello"}]
CHAT = "/v1/chat/completions"
KEY = "a-key-of-enough-characters"


def _send_raw(server: Running, body: dict[str, Any]) -> socket.socket:
    """Send a request and keep the connection, so that it can be cut at any moment."""
    content = json.dumps(body).encode()
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    connection.sendall(head.encode() + content)
    return connection


@pytest.mark.parametrize("streamed", [True, False])
def test_the_generation_stops_when_the_client_goes_away(gate: Gate, streamed: bool) -> None:
    with scripted("", gate) as up:
        client = _send_raw(up, {"messages": HELLO, "stream": streamed, "max_tokens": 150})
        gate.let(10)
        wait_for(lambda: gate.work == 10)
        client.close()
        wait_for(lambda: not up.context.queue.open or _left(up))
        gate.open()  # from here on nothing holds the engine up but that nobody wants the answer
        wait_for(lambda: up.context.queue.admission.running == 0)
        assert gate.work <= 12, "of 150 pieces of work"
        assert up.metric("phi3_cancelled_total") == 1
        assert up.openai().chat.completions.create(model="m", messages=HELLO, max_tokens=3)


def _left(server: Running) -> bool:
    return all(exchange._left.is_set() for exchange in server.context.queue.open)


def test_a_long_prompt_is_given_up_between_two_pieces(gate: Gate) -> None:
    with scripted("abc", gate) as up:
        long = [{"role": "user", "content": "w" * 190}]
        client = _send_raw(up, {"messages": long, "max_tokens": 2})
        gate.let(1)
        wait_for(lambda: gate.work == 1)
        client.close()
        wait_for(lambda: _left(up))
        gate.open()
        wait_for(lambda: up.context.queue.admission.running == 0)
        assert gate.work == 2, "the piece that was being computed, and none after it"


def test_who_waits_and_leaves_is_never_begun(gate: Gate) -> None:
    with scripted("abc", gate, running=1) as up:
        first = _send_raw(up, {"messages": HELLO})
        wait_for(lambda: up.context.queue.admission.running == 1)
        second = _send_raw(up, {"messages": [{"role": "user", "content": "second"}]})
        wait_for(lambda: up.context.queue.admission.waiting == 1)
        second.close()
        wait_for(lambda: up.context.queue.admission.waiting == 0)
        gate.open()
        assert b"200 OK" in first.recv(1000)
        wait_for(lambda: up.context.queue.admission.running == 0)
        assert gate.work == 4, "the prompt and its three letters, once"


def test_beyond_the_queue_429_says_when_to_come_again(gate: Gate) -> None:
    with scripted("abc", gate, running=1, waiting=2) as up, ThreadPoolExecutor(3) as pool:
        queue, http = up.context.queue, up.http()
        asked = {"messages": HELLO}
        answers = [pool.submit(http.post, CHAT, json=asked) for _ in range(3)]
        wait_for(lambda: (queue.admission.running, queue.admission.waiting) == (1, 2))
        refused = http.post(CHAT, json=asked)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        with pytest.raises(openai.RateLimitError):
            up.openai().chat.completions.create(model="m", messages=HELLO)
        bad = http.post(CHAT, json={"messages": []})
        assert bad.status_code == 400, "a wrong request hears so at once"
        assert up.metric("phi3_waiting") == 2
        gate.open()
        assert [answer.result().status_code for answer in answers] == [200] * 3
        assert http.post(CHAT, json=asked).status_code == 200


def test_requests_take_turns(gate: Gate) -> None:
    """A short request beside a long one ends long before it, and neither changes the other."""
    with scripted("", gate, running=2) as up, ThreadPoolExecutor(2) as pool:
        http = up.http()
        long = pool.submit(http.post, CHAT, json={"messages": HELLO, "max_tokens": 150})
        gate.let(5)
        wait_for(lambda: gate.work == 5)
        short = pool.submit(http.post, CHAT, json={"messages": HELLO, "max_tokens": 5})
        wait_for(lambda: up.context.queue.admission.running == 2)
        for _ in range(40):
            gate.let(1)
            if short.done():
                break
            time.sleep(0.01)
        wait_for(short.done)
        assert not long.done()
        gate.open()
        assert long.result().json()["choices"][0]["message"]["content"] == "a" * 150
        assert short.result().json()["choices"][0]["message"]["content"] == "a" * 5


@pytest.mark.parametrize("streamed", [True, False])
def test_time_is_limited(gate: Gate, streamed: bool) -> None:
    with scripted("", gate, limit_s=0.5) as up:
        gate.let(5)
        answer = up.http().post(CHAT, json={"messages": HELLO, "stream": streamed})
        assert '"code":"timeout"' in answer.text
        assert answer.status_code == (200 if streamed else 504)
        assert "[DONE]" not in answer.text
        gate.open()
        wait_for(lambda: up.context.queue.admission.running == 0)
        assert up.metric("phi3_timed_out_total") == 1


def test_time_in_the_queue_counts(gate: Gate) -> None:
    with scripted("", gate, limit_s=0.5, running=1) as up, ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(up.http().post, CHAT, json={"messages": HELLO}) for _ in range(2)]
        assert [answer.result().status_code for answer in answers] == [504, 504]
        assert up.context.queue.admission.waiting == 0
        gate.open()


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/invocations"])
def test_large_bodies_are_refused(path: str) -> None:
    with scripted("abc", body_limit=1000) as up:
        headers = {"Content-Type": "application/json"}
        for content in (b"x" * 1001, iter([b"x" * 600, b"x" * 600])):
            answer = up.http().post(path, content=content, headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


def test_a_key_is_asked_for_and_compared() -> None:
    with scripted("abc", api_key=KEY) as up:
        up.key = ""
        http = up.http()
        for path in ("/v1/models", "/metrics", "/nope"):
            assert http.get(path).status_code == 401
        for path in (CHAT, "/v1/completions", "/invocations"):
            assert http.post(path, json={}).status_code == 401
        for wrong in ("x", KEY + "x", KEY[:-1], "ü", ""):
            headers = {b"Authorization": f"Bearer {wrong}".strip().encode()}
            answer = http.get("/v1/models", headers=headers)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert KEY not in answer.text
        assert [http.get(path).status_code for path in ("/", "/ping", "/health")] == [200] * 3
        up.key = KEY
        assert up.openai().chat.completions.create(model="m", messages=HELLO)
        assert httpx.get(f"{up.url}/v1/models", headers={
            "Authorization": f"bearer {KEY}", "Host": "models.example",
        }).status_code == 200, "with a key any name may be used"  # fmt: skip


def test_without_a_key_a_web_page_cannot_ask() -> None:
    """A page may give its own host name the address 127.0.0.1 (DNS rebinding)."""
    with scripted("abc") as up:
        http = up.http()
        port = up.url.rpartition(":")[2]
        for host, status in (
            ("evil.example", 403), (f"evil.example:{port}", 403), ("127.0.0.1.evil.example", 403),
            (f"localhost:{port}", 200), (f"127.0.0.1:{port}", 200), (f"[::1]:{port}", 200),
            ("LOCALHOST", 200), ("127.0.0.1", 200), ("[::1]", 200), ("[evil]", 403), ("", 403),
        ):  # fmt: skip
            assert http.get("/v1/models", headers={"Host": host}).status_code == status, host


def test_running_answers_are_finished_when_the_server_ends(gate: Gate) -> None:
    with scripted("All of it.", gate, running=1) as up, ThreadPoolExecutor(3) as pool:
        http = up.http()
        running = pool.submit(http.post, CHAT, json={"messages": HELLO, "stream": True})
        wait_for(lambda: up.context.queue.admission.running == 1)
        waiting = pool.submit(http.post, CHAT, json={"messages": HELLO})
        wait_for(lambda: up.context.queue.admission.waiting == 1)
        up.server.should_exit = True
        wait_for(lambda: not up.server.servers[0].is_serving())
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{up.url}/ping")
        gate.open()
        assert running.result().text.endswith("data: [DONE]\n\n")
        assert waiting.result().json()["choices"][0]["message"]["content"] == "All of it."
        up.thread.join(20)
        assert not up.thread.is_alive()


def test_many_clients_at_once_are_all_answered() -> None:
    with scripted("Some words for everyone.", running=4, waiting=100) as up:
        client, barrier = up.openai(), threading.Barrier(24)

        def ask(number: int) -> str:
            barrier.wait()
            chunks = client.chat.completions.create(
                model="m", messages=[{"role": "user", "content": f"I am {number}"}], stream=True
            )
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

        with ThreadPoolExecutor(24) as pool:
            assert list(pool.map(ask, range(24))) == ["Some words for everyone."] * 24
        wait_for(lambda: up.context.queue.admission.running == 0)
        assert not up.context.queue.open


def test_an_answer_is_not_larger_than_the_question() -> None:
    with scripted("abc") as up:
        http = up.http()
        wrong: list[dict[str, Any]] = [
            {"messages": [{}] * 190},
            {"messages": [{"role": "user"}] * 40_000},
            {"messages": HELLO, "stop": ["x"] * 100_000},
            {"messages": HELLO, "stop": [""] * 60},
        ]
        for body in wrong:
            answer = http.post(CHAT, json=body)
            assert answer.status_code == 400
            assert len(answer.content) < 12_000
        told = http.post(CHAT, json=wrong[0]).json()["error"]["message"]
        assert "messages[0].role" in told
        assert told.endswith("and 360 more problems")
        assert "messages: 40000 of them cannot fit" in http.post(CHAT, json=wrong[1]).text


@pytest.mark.parametrize("items", [10_000_000, 100_000_000])
def test_a_schema_that_would_end_the_server_is_refused(items: int) -> None:
    bomb = {"type": "array", "items": {"type": "integer"}, "minItems": items}
    asked = {
        "messages": HELLO,
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": bomb}},
    }
    with scripted("abc") as up:
        answer = up.http().post(CHAT, json=asked)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "response_format.json_schema.schema"
        assert "the shortest answer that follows it" in answer.text
        assert up.openai().chat.completions.create(model="m", messages=HELLO)


def test_more_rows_than_are_worth_a_request_are_refused_before_they_are_read() -> None:
    from phi3_mlflow.server.errors import ApiError
    from phi3_mlflow.server.mlflow_routes import MOST_ROWS, _refuse_many_rows

    rows = [{"messages": HELLO}]
    many: list[Any] = [
        {"dataframe_records": rows * (MOST_ROWS + 1)},
        {"dataframe_split": {"columns": ["messages"], "data": [[1]] * (MOST_ROWS + 1)}},
        {"inputs": {"messages": rows * (MOST_ROWS + 1)}},
        {"instances": rows * (MOST_ROWS + 1)},
    ]
    for content in many:
        with pytest.raises(ApiError, match="1001 rows; at most 1000"):
            _refuse_many_rows(json.dumps(content).encode(), "application/json")
    _refuse_many_rows(json.dumps({"inputs": rows * MOST_ROWS}).encode(), "application/json")
    with pytest.raises(ApiError, match="rows"):
        _refuse_many_rows(b"a\n" * 1002, "text/csv")
    _refuse_many_rows(b"no json", "application/json")
