"""Whatever a schema demands, it is answered or refused, and everybody else is answered, too."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlflow.pyfunc.model import PythonModelContext

from phi3_mlflow.runtime import grammar_trial, request_fields
from phi3_mlflow.runtime.python_model import ChatPythonModel
from phi3_mlflow.server import vetting
from tests.fixtures.tiny_checkpoints import checkpoint, onnx_dir
from tests.server.conftest import Running, fixed, running, wait_for

__all__ = ["checkpoint", "onnx_dir"]

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]
INTEGERS: dict[str, Any] = {"type": "array", "items": {"type": "integer"}}
_HANG_S = 300.0  # nothing is timed: only what hangs is to end


@pytest.fixture(scope="module")
def up(onnx_dir: Path) -> Iterator[Running]:
    model = ChatPythonModel()
    config = {"threads": 1, "model_name": "m"}
    model.load_context(PythonModelContext({"onnx": str(onnx_dir)}, config))
    with running(fixed(model)) as server:
        yield server


class SomebodyElse:
    """A client that asks one plain question after the other, and is answered."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._stop = threading.Event()
        self.statuses: list[int] = []
        self._thread = threading.Thread(target=self._ask, daemon=True)

    def __enter__(self) -> SomebodyElse:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(_HANG_S)
        assert not self._thread.is_alive()
        assert set(self.statuses) == {200}

    def _ask(self) -> None:
        with httpx.Client(base_url=self._url, timeout=_HANG_S) as http:
            while not self._stop.is_set():
                asked = {"messages": HELLO, "max_tokens": 3}
                self.statuses.append(http.post(CHAT, json=asked).status_code)

    def is_answered_again(self) -> None:
        """Wait for an answer to a question that was asked after this was called."""
        before, end = len(self.statuses), time.monotonic() + _HANG_S
        while len(self.statuses) < before + 2:
            assert time.monotonic() < end, "nobody else is answered"
            time.sleep(0.005)


def asked(schema: Any, **more: Any) -> dict[str, Any]:
    wanted = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    return {"messages": HELLO, "max_tokens": 12, "response_format": wanted, **more}


def follow(up: Running, schema: Any, **more: Any) -> httpx.Response:
    with httpx.Client(base_url=up.url, timeout=_HANG_S) as http:
        return http.post(CHAT, json=asked(schema, **more))


_NUMBERS = st.sampled_from([0, 1, 2, 50, 3000, 10**7, 10**9, 10**18, -1, 1.5, 1e300, "3", None])
_PATTERNS = st.sampled_from(
    ["^[a-z]+$", "a{1000}", "(a{99}){99}", "(a|b)*a(a|b){12}", "((a*)*)*b", "(", "[^", r"\p{L}{50}",
     "(?=a)b", "(.|\\n){500}", "^(x+x+)+y$", "(a?){40}a{40}", "a{0,9999999}", ""]
) | st.text(max_size=6)  # fmt: skip
_REFERENCES = st.sampled_from(
    ["#", "#/$defs/a", "#/$defs/b", "#/nowhere", "#/$defs", "http://example.com/schema", "", 7]
)
_TYPES = st.sampled_from(
    ["object", "array", "string", "integer", "number", "boolean", "null", "nonsense", 3,
     ["string", "null"], []]
)  # fmt: skip
_COUNTED = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties",
            "minimum", "maximum", "multipleOf")  # fmt: skip
_NAMES = st.sampled_from(["a", "b", "a b", "ä", "$ref"])


def _parts(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    several = st.lists(inner, max_size=3)
    named = st.dictionaries(_NAMES, inner, max_size=3)
    whole: dict[str, st.SearchStrategy[Any]] = {
        "type": _TYPES,
        "items": inner,
        "prefixItems": several,
        "properties": named,
        "additionalProperties": inner,
        "patternProperties": st.dictionaries(_PATTERNS, inner, max_size=2),
        "required": st.lists(_NAMES, max_size=3),
        "anyOf": several,
        "oneOf": several,
        "allOf": several,
        "not": inner,
        "$defs": named,
        "$ref": _REFERENCES,
        "pattern": _PATTERNS,
        "format": st.sampled_from(["date-time", "uuid", "email", "uri", "x"]),
        "const": st.sampled_from([1, "x", None, {"a": [1]}, "y" * 2000]),
        "enum": st.sampled_from([5, 500, 5000]).map(lambda count: [f"v{i}" for i in range(count)]),
        **dict.fromkeys(_COUNTED, _NUMBERS),
    }
    return st.fixed_dictionaries({}, optional=whole) | st.dictionaries(
        st.sampled_from(list(whole)), st.none() | st.integers() | st.text(max_size=3), max_size=2
    )


def _deep(part: Any, depth: int, by: str) -> Any:
    for _ in range(depth):
        part = {"properties": {"a": part}, "required": ["a"]} if by == "object" else {by: part}
    return part


_SOME = st.recursive(st.booleans() | st.builds(lambda kind: {"type": kind}, _TYPES), _parts,
                     max_leaves=8)  # fmt: skip
SCHEMAS = _SOME | st.builds(
    _deep, _SOME, st.sampled_from([3, 30, 60, 200]), st.sampled_from(["items", "object", "not"])
)


@pytest.mark.slow
@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(schema=SCHEMAS, whole=st.booleans())
def test_any_schema_is_followed_or_refused(up: Running, schema: Any, whole: bool) -> None:
    if whole and isinstance(schema, dict):
        schema = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": schema}, **schema}
    with SomebodyElse(up.url) as other:
        answer = follow(up, schema)
        other.is_answered_again()
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 400:
        error = answer.json()["error"]
        assert error["param"].startswith("response_format"), error
    else:
        choice = answer.json()["choices"][0]
        if choice["finish_reason"] == "stop":
            json.loads(choice["message"]["content"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "schema",
    [
        {**INTEGERS, "minItems": 100_000_000},
        {"type": "object", "minProperties": 100_000_000},
        {"type": "string", "pattern": "^((ab){9999}){9999}$"},
        {"type": "integer", "multipleOf": 999_983},
        {"allOf": [{"anyOf": [{"properties": {f"k{key}": {"const": i}}, "required": [f"k{key}"]}
                              for i in range(12)]} for key in range(5)]},
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        {"allOf": [{"pattern": f"(a|b)*a{i}(a|b){{40}}"} for i in range(9)]},
    ],
)  # fmt: skip
def test_what_no_rule_knows_ends_neither_the_server_nor_others_answers(
    up: Running, schema: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the rules that look at a schema first: tomorrow's bomb is one they let through."""
    monkeypatch.setattr(request_fields, "bounded", lambda given, room: (json.dumps(given), []))
    with SomebodyElse(up.url) as other:
        first = follow(up, schema)
        other.is_answered_again()
        again = follow(up, schema)
        other.is_answered_again()
    assert first.status_code in (200, 400)
    assert (again.status_code, again.json().get("error")) == (
        first.status_code, first.json().get("error"),
    )  # fmt: skip


def test_the_largest_are_refused_by_the_trial(up: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_fields, "bounded", lambda given, room: (json.dumps(given), []))
    answer = follow(up, {**INTEGERS, "minItems": 50_000_000})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "response_format"
    assert "the JSON schema cannot be followed: its grammar takes more than" in error["message"]
    assert follow(up, {**INTEGERS, "minItems": 1, "maxItems": 1}).status_code == 200


def test_schemas_that_wait_hold_up_nobody_and_are_not_many(
    up: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, began = threading.Event(), threading.Event()

    def held(self: Any, schema: str) -> tuple[str | None, bool]:
        began.set()
        assert go.wait(_HANG_S)
        return None, True

    monkeypatch.setattr(vetting, "MOST_WAITING", 2)
    known = {"type": "object", "properties": {"known": {"type": "null"}}}
    assert follow(up, known).status_code == 200
    found: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(grammar_trial.GrammarTrial, "_try", held)
        waiting = [
            threading.Thread(target=lambda: found.append(follow(up, {"const": "held"}).status_code))
            for _ in range(2)
        ]
        for thread in waiting:
            thread.start()
        assert began.wait(_HANG_S)
        wait_for(lambda: up.context.vetting._waiting == 2, "both")
        full = follow(up, {"const": "one too many"})
        assert full.status_code == 429
        assert full.headers["retry-after"]
        with SomebodyElse(up.url) as other:
            other.is_answered_again()
        assert follow(up, known).status_code == 200, "a schema that was seen waits for none"
        go.set()
        for thread in waiting:
            thread.join(_HANG_S)
    assert found == [200, 200]
