"""A server in this process, on a port of its own, over an engine that says what it is told to."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from phi3_mlflow.runtime.python_model import ChatPythonModel
from phi3_mlflow.server.app import create_app
from phi3_mlflow.server.context import ServerContext
from phi3_mlflow.server.holder import Holder, Loaded, Target
from phi3_mlflow.server.settings import ServerSettings
from tests.runtime.scripted import ScriptedEngine, model_on

PATIENCE = 20.0


@dataclass
class Running:
    """A server that answers: its address, and its inside for tests that look there."""

    url: str
    context: ServerContext
    server: uvicorn.Server
    thread: threading.Thread
    key: str = ""
    clients: list[Any] = field(default_factory=list)

    def openai(self, **more: Any) -> openai.OpenAI:
        """The official client; no retries, which would hide what the server says."""
        client = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=self.key or "unused", max_retries=0, timeout=30,
            **more,
        )  # fmt: skip
        self.clients.append(client)
        return client

    def http(self) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        client = httpx.Client(base_url=self.url, headers=headers, timeout=30)
        self.clients.append(client)
        return client

    def metric(self, line: str) -> float:
        """The value of one line of /metrics."""
        for found in self.http().get("/metrics").text.splitlines():
            if found.startswith(line + " "):
                return float(found.rpartition(" ")[2])
        raise AssertionError(f"no metric {line}")


@contextmanager
def running(holder: Holder, uri: str = "models:/m@champion", **settings: Any) -> Iterator[Running]:
    """Serve what a holder holds until the block ends."""
    made = ServerSettings(**{"port": 0, **settings})
    app = create_app(made, holder, uri)
    config = uvicorn.Config(
        app, port=0, log_config=None, log_level="critical", timeout_graceful_shutdown=30
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started or not thread.is_alive())
    assert server.started
    port = server.servers[0].sockets[0].getsockname()[1]
    found = Running(f"http://127.0.0.1:{port}", app.state.context, server, thread, made.api_key)
    try:
        yield found
    finally:
        for client in found.clients:
            client.close()
        app.state.context.queue.abandon_all()
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive(), "the server did not end"


def loaded(made: ChatPythonModel, version: str = "1", model: Any = None) -> Loaded:
    return Loaded(Target("m", version, f"models:/m/{version}"), model, made.live(), time.time())


def fixed(made: ChatPythonModel, model: Any = None) -> Holder:
    """A holder of one model that stays."""
    one = loaded(made, model=model)
    return Holder(lambda: one.target, lambda target: one, follow_s=3600)


@contextmanager
def scripted(
    script: str = "", on_extend: Callable[[Any], None] | None = None, **settings: Any
) -> Iterator[Running]:
    """A server whose model says `script`, or never ends."""
    with running(
        fixed(model_on(ScriptedEngine(script, on_extend), model_name="m")), **settings
    ) as up:
        yield up


def wait_for(true: Callable[[], Any], what: str = "it") -> None:
    """Wait until something is so; fails when it does not become so."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, f"{what} did not happen"
        time.sleep(0.005)


class Gate:
    """Lets an engine do pieces of work one by one, or all of them."""

    def __init__(self, pieces: int = 0) -> None:
        self._allowed = threading.Semaphore(pieces)
        self._open = threading.Event()
        self.work = 0

    def __call__(self, tokens: Any) -> None:
        while not self._open.is_set() and not self._allowed.acquire(timeout=0.005):
            pass
        self.work += 1

    def let(self, pieces: int) -> None:
        self._allowed.release(pieces)

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.open()
