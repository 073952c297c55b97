"""Schemas that no answer could follow never reach the grammar's compiler; others do unharmed."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.pyfunc.model import PythonModelContext

from phi3_mlflow.runtime.json_schema import COMPACT, bounded
from phi3_mlflow.runtime.python_model import ChatPythonModel

ROOM = 1000
INTEGERS: dict[str, Any] = {"type": "array", "items": {"type": "integer"}}


def nested(depth: int, **more: Any) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema, **more}
    return schema


def keyed(key: Any, count: int) -> dict[str, Any]:
    """As many alternatives, told apart by what a key holds."""
    name = f"k{key}"
    return {"anyOf": [{"properties": {name: {"const": i}}, "required": [name]}
                      for i in range(count)]}  # fmt: skip


def entangled(count: int, how: str, end: Any = True) -> dict[str, Any]:
    """Definitions of which each needs the next one twice: 2 to the power of `count` ways."""
    defs: dict[str, Any] = {f"d{count}": end}
    for at in range(count):
        twice = [{"$ref": f"#/$defs/d{at + 1}"}, {"allOf": [{"$ref": f"#/$defs/d{at + 1}"}]}]
        defs[f"d{at}"] = (
            {"anyOf": twice}
            if how == "anyOf"
            else {
                "type": "object",
                "properties": dict(zip("ab", twice, strict=True)),
                "required": ["a", "b"],
            }
        )
    return {"$defs": defs, "$ref": "#/$defs/d0"}


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ({**INTEGERS, "minItems": 10_000_000}, "the shortest answer that follows it has 20000001"),
        ({**INTEGERS, "minItems": 1e12}, "the shortest answer"),
        ({**INTEGERS, "minItems": -1}, "minItems is -1"),
        ({"type": "string", "minLength": 100_000}, "the shortest answer"),
        ({"type": "object", "minProperties": 100_000}, "the shortest answer"),
        (nested(20, minItems=2), "the shortest answer"),
        (nested(70), "nested more than 64 deep"),
        ({"enum": [[]], "x": nested(80)}, "nested more than 64 deep"),
        ({"$ref": "#"}, "without an end"),
        ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
          "$ref": "#/$defs/a"}, "without an end"),
        ({"$defs": {"a": {"type": "object", "properties": {"b": {"$ref": "#/$defs/a"}},
                          "required": ["b"]}}, "$ref": "#/$defs/a"}, "without an end"),
        ({"type": "string", "pattern": "a{1,1000000}"}, "repeats {1,1000000}"),
        ({"type": "string", "pattern": "a{" + "9" * 5000 + "}"}, "characters"),
        ({"type": "string", "pattern": "a" * 5000}, "a pattern of 5000 characters"),
        ({"properties": {f"p{i}": {"type": "null"} for i in range(3000)}}, "characters"),
        ({"anyOf": [{}] * 3000}, "more than 2000 parts"),
        ({"description": "x" * 100_000}, "at most 64000"),
        ({"type": "integer", "multipleOf": 999_983}, "multipleOf takes 999983 states"),
        ({"allOf": [{"multipleOf": 97}, {"multipleOf": 89}]}, "multipleOf takes 8633 states"),
        ({"properties": {f"p{i}": {"multipleOf": 997} for i in range(9)}}, "multipleOf takes"),
        ({"type": "string", "pattern": "^((ab){9999}){9999}$"}, "match 2e+08 characters"),
        ({"type": "string", "pattern": r"^(\(|[)]{90}){9999}$"}, "characters"),
        ({"properties": {f"p{i}": {"pattern": "(ab){9000}"} for i in range(2)}}, "characters"),
        ({"allOf": [keyed(key, 5) for key in range(5)]}, "allOf combines more than 128"),
        ({"$defs": {"a": keyed(0, 20)}, "$ref": "#/$defs/a", **keyed(1, 20)}, "allOf combines"),
        ({"allOf": [{"properties": {"a": {"items": keyed(key, 12)}}} for key in "bc"]},
         "allOf combines"),
        ({"properties": {f"p{i}": {"allOf": [keyed(0, 4), keyed(1, 4)]} for i in range(20)}},
         "allOf combines"),
        ({"allOf": [{"pattern": f"a{i}"} for i in range(5)]}, "allOf combines 5 patterns"),
        (entangled(60, "required"), "the shortest answer"),
        (entangled(60, "anyOf", end={"$ref": "#/$defs/d0"}), "too entangled"),
    ],
)  # fmt: skip
def test_what_no_answer_can_hold_is_refused_at_once(schema: dict[str, Any], problem: str) -> None:
    _, problems = bounded(schema, ROOM)
    assert any(problem in line for line in problems), problems


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        {**INTEGERS, "minItems": 3, "maxItems": 5},
        {"type": "string", "maxLength": 100_000, "pattern": "^[a-z]{2,30}$"},
        {"$defs": {"tree": {"type": "object", "properties": {
            "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}}},
            "required": ["children"]}}, "$ref": "#/$defs/tree"},
        {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/x"}], "$defs": {"x": {"$ref": "#"}}},
        {"type": "array", "prefixItems": [{"const": 1}, False], "minItems": 1},
        {"type": "number", "multipleOf": 0.01, "minimum": 0, "allOf": [{"multipleOf": 5}]},
        {"type": "integer", "multipleOf": 1_000_000},
        {"properties": {f"p{i}": {"pattern": "^[A-Z]{2}[0-9]{10,30}$"} for i in range(50)}},
        {"allOf": [{"properties": {"a": {"anyOf": [{"type": "null"}, {"type": "string"}]}}},
                   {"properties": {"b": {"anyOf": [{"type": "null"}, {"type": "integer"}]}}}]},
        {"properties": {f"p{i}": {"anyOf": [{"type": "null"}, {"type": "string"}]}
                        for i in range(99)}},
    ],
)  # fmt: skip
def test_sound_schemas_stay_as_they_are_but_for_the_blanks(schema: dict[str, Any]) -> None:
    text, problems = bounded(schema, ROOM)
    assert problems == []
    assert json.loads(text) == {**schema, "x-guidance": COMPACT}


def test_a_client_can_have_its_own_spacing() -> None:
    schema = {"type": "object", "x-guidance": {"whitespace_flexible": True}}
    assert json.loads(bounded(schema, ROOM)[0]) == schema


def test_upper_limits_beyond_the_room_are_left_out() -> None:
    text, problems = bounded({**INTEGERS, "maxItems": 10_000_000}, ROOM)
    assert problems == []
    assert "maxItems" not in json.loads(text)


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
_SCHEMAS = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(
        st.sampled_from(
            ["type", "items", "minItems", "maxItems", "minLength", "properties", "required", "$ref",
             "anyOf", "oneOf", "allOf", "prefixItems", "pattern", "$defs", "a", "minProperties"]
        ),
        inner | st.sampled_from(["array", "object", "string", "#", "#/$defs/a", 10**9]),
        max_size=5,
    ),
    max_leaves=25,
)  # fmt: skip


@given(st.dictionaries(st.text(max_size=8), _SCHEMAS, max_size=5))
def test_anything_is_looked_at_without_a_fault(schema: dict[str, Any]) -> None:
    text, problems = bounded(schema, ROOM)
    assert isinstance(text, str)
    assert all(isinstance(problem, str) for problem in problems)


_LEAVES = st.sampled_from(
    [{"type": "integer"}, {"type": "boolean"}, {"type": "null"}, {"enum": ["red", "green"]}]
)
_FINITE = st.recursive(
    _LEAVES,
    lambda inner: (
        st.builds(
            lambda item, least: {"type": "array", "items": item, "minItems": least, "maxItems": 3},
            inner,
            st.integers(0, 2),
        )
        | st.dictionaries(st.sampled_from(["x", "note", "a b"]), inner, max_size=3).map(
            lambda given: {
                "type": "object",
                "properties": given,
                "required": sorted(given),
                "additionalProperties": False,
            }
        )
    ),
    max_leaves=5,
)


@settings(max_examples=30)
@given(schema=_FINITE, seed=st.integers(0, 2**31))
def test_answers_are_valid_json_without_runs_of_blanks(
    onnx_dir: Path, schema: dict[str, Any], seed: int
) -> None:
    """A model with random weights goes wherever it may: into blanks without end, too."""
    model = _loaded(onnx_dir)
    asked = {
        "messages": [{"role": "user", "content": "x"}],
        "response_format": {"type": "json_schema", "json_schema": {"schema": schema}},
        "temperature": 1.0,
        "seed": seed,
        "max_tokens": 300,
    }
    choice = model.predict(None, asked)["choices"][0]
    text = choice["message"]["content"]
    assert "  " not in text
    assert "\n" not in text
    if choice["finish_reason"] == "stop":
        json.loads(text)


@functools.cache
def _loaded(onnx_dir: Path) -> ChatPythonModel:
    model = ChatPythonModel()
    model.load_context(PythonModelContext({"onnx": str(onnx_dir)}, {}))
    return model
