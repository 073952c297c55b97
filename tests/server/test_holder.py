"""Following the alias: which model answers, when, and what becomes of the one before."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlflow
import pytest

from phi3_mlflow.core.errors import UserError
from phi3_mlflow.server.holder import Holder, Loaded, Target, resolve
from tests.conftest import Workspace
from tests.runtime.scripted import ScriptedEngine, model_on
from tests.server.conftest import Gate, loaded, running, wait_for

HELLO: Any = [{"role": "user", "content": "Hello"}]


class Registry:
    """A registry with one alias, and models that say which version they are."""

    def __init__(self, gate: Gate | None = None) -> None:
        self.version = "1"
        self.broken: set[str] = set()
        self.away = False
        self.loads: list[str] = []
        self.gate = gate
        self.alive: list[weakref.ref[Any]] = []

    def resolve(self) -> Target:
        if self.away:
            raise ConnectionError("no registry at host db.internal")
        return Target("m", self.version, f"models:/m/{self.version}")

    def load(self, target: Target) -> Loaded:
        self.loads.append(target.version)
        if target.version in self.broken:
            raise OSError("/secret/path is damaged")
        engine = ScriptedEngine(f"Version {target.version}.", self.gate)
        self.alive.append(weakref.ref(engine))
        return loaded(model_on(engine, model_name="m"), target.version)

    def holder(self) -> Holder:
        return Holder(self.resolve, self.load, follow_s=0.02)


def test_the_server_takes_up_a_version_without_dropping_a_request(gate: Gate) -> None:
    registry = Registry(gate)
    with running(registry.holder()) as up, ThreadPoolExecutor(2) as pool:
        http = up.http()
        body = {"messages": HELLO, "stream": True}
        under_way = pool.submit(http.post, "/v1/chat/completions", json=body)
        gate.let(3)
        wait_for(lambda: gate.work == 3)
        registry.version = "2"
        wait_for(lambda: http.get("/v1/models").headers["x-model-version"] == "2")
        gate.open()
        new = http.post("/v1/chat/completions", json={"messages": HELLO})
        assert new.headers["x-model-version"] == "2"
        assert new.json()["choices"][0]["message"]["content"] == "Version 2."
        old = under_way.result()
        assert old.headers["x-model-version"] == "1"
        assert old.text.endswith("data: [DONE]\n\n")
        said = old.text.count('"content":') - 1
        assert said == len("Version 1."), "the answer that was under way is whole"
        assert up.metric('phi3_model_info{name="m",version="2"}') == 1
        assert up.metric('phi3_model_changes_total{outcome="loaded"}') == 1


def test_the_memory_of_the_version_before_is_given_back() -> None:
    registry = Registry()
    holder = registry.holder()
    with running(holder) as up:
        up.openai().chat.completions.create(model="m", messages=HELLO)
        registry.version = "2"
        wait_for(lambda: holder.current.version == "2")
        up.openai().chat.completions.create(model="m", messages=HELLO)

        def gone() -> bool:
            gc.collect()
            return registry.alive[0]() is None

        wait_for(gone, "version 1 leaving memory")


def test_every_request_is_answered_while_the_alias_moves_again_and_again() -> None:
    registry = Registry()
    with running(registry.holder(), waiting=100) as up, ThreadPoolExecutor(4) as pool:
        client = up.openai()

        def ask(number: int) -> tuple[str, str | None]:
            registry.version = str(1 + number // 10)
            raw = client.chat.completions.with_raw_response.create(model="m", messages=HELLO)
            return raw.headers["x-model-version"], raw.parse().choices[0].message.content

        answers = list(pool.map(ask, range(60)))
        assert all(text == f"Version {version}." for version, text in answers)
        wait_for(lambda: up.context.holder.current.version == registry.version)


def test_a_version_that_cannot_be_loaded_changes_nothing(caplog: Any) -> None:
    registry = Registry()
    holder = registry.holder()
    registry.version, registry.broken = "2", {"2"}
    assert not holder.look()
    assert not holder.look()
    assert holder.current.version == "1"
    assert registry.loads == ["1", "2"], "it is not tried again at every look"
    assert "/secret" not in caplog.text
    registry.version = "3"
    assert holder.look()
    assert holder.current.version == "3"


def test_a_registry_that_is_away_changes_nothing(caplog: Any) -> None:
    registry = Registry()
    holder = registry.holder()
    registry.away = True
    assert not holder.look()
    assert holder.current.version == "1"
    assert "db.internal" not in caplog.text


def test_uris_are_resolved_by_the_registry(workspace: Workspace) -> None:
    client = mlflow.MlflowClient()
    client.create_registered_model("m")
    for _ in range(2):
        client.create_model_version("m", (workspace.folder / "model").as_uri())
    client.set_registered_model_alias("m", "champion", "1")
    assert resolve("models:/m@champion") == Target("m", "1", "models:/m/1")
    assert resolve("models:/m/2") == Target("m", "2", "models:/m/2")
    assert resolve("models:/m-0123") == Target("m-0123", "m-0123", "models:/m-0123")
    assert "/" not in resolve("/srv/models/mine").name
    for wrong in ("models:/m@other", "models:/m/9", "models:/none@champion"):
        with pytest.raises(UserError, match="the registry has no"):
            resolve(wrong)
