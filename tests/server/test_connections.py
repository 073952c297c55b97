"""Connections that say nothing, or half of something: they end, and others are answered."""

from __future__ import annotations

import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
import uvicorn

from phi3_mlflow.server.connections import LimitedConnection, most_connections
from tests.server.conftest import wait_for

HALF = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Le"

SERVER = """
import resource, uvicorn
resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
from phi3_mlflow.server.connections import LimitedConnection
LimitedConnection.head_s = 3.0
async def app(scope, receive, send):
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"pong"})
config = uvicorn.Config(app, port=0, http=LimitedConnection, log_config=None, lifespan="off")
server = uvicorn.Server(config)
listening = config.bind_socket()
print(listening.getsockname()[1], flush=True)
server.run([listening])
"""


async def answering(scope, receive, send) -> None:  # type: ignore[no-untyped-def]
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"pong"})


@contextmanager
def serving(connection: type[LimitedConnection]) -> Iterator[int]:
    config = uvicorn.Config(
        answering, port=0, http=connection, log_config=None, lifespan="off", log_level="critical"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join(20)


def open_half(port: int, sent: bytes) -> socket.socket:
    made = socket.create_connection(("127.0.0.1", port), timeout=20)
    if sent:
        made.sendall(sent)
    return made


@pytest.mark.parametrize("sent", [b"", b"G", HALF])
def test_a_connection_that_says_nothing_whole_is_ended(sent: bytes) -> None:
    quick = type("Quick", (LimitedConnection,), {"head_s": 0.3})
    with serving(quick) as port:
        silent = open_half(port, sent)
        assert silent.recv(1000).startswith(b"HTTP/1.1 408")
        assert silent.recv(1000) == b""


def test_so_is_one_that_was_answered_before() -> None:
    quick = type("Quick", (LimitedConnection,), {"head_s": 0.3})
    with serving(quick) as port:
        made = open_half(port, b"GET /ping HTTP/1.1\r\nHost: localhost\r\n\r\n")
        told = made.recv(1000)
        while not told.endswith(b"0\r\n\r\n"):
            told += made.recv(1000)
        made.sendall(HALF)
        assert made.recv(1000).startswith(b"HTTP/1.1 408")


def test_more_than_are_taken_are_told_so_and_the_others_are_answered() -> None:
    few = type("Few", (LimitedConnection,), {"most": 3})
    with serving(few) as port:
        kept = [open_half(port, HALF) for _ in range(3)]
        refused = open_half(port, b"")
        assert refused.recv(1000).startswith(b"HTTP/1.1 503")
        kept.pop().close()
        wait_for(lambda: httpx.get(f"http://127.0.0.1:{port}/ping").status_code == 200)


def test_more_silent_connections_than_file_descriptors() -> None:
    process = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        silent = []
        for _ in range(200):
            try:
                silent.append(open_half(port, HALF))
            except OSError:  # refused while it was being opened
                continue

        def answered() -> bool:
            try:
                return httpx.get(f"http://127.0.0.1:{port}/ping", timeout=5).text == "pong"
            except httpx.HTTPError:
                return False

        wait_for(answered, "an answer once the silent ones have had their time")
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def test_the_limit_leaves_room_for_other_files() -> None:
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert 8 <= most_connections() <= max(8, min(1000, allowed - 64))
