"""Whether an answer passes its check, however hostile the answer is."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from phi3_mlflow.evaluation import checks
from phi3_mlflow.evaluation.wrong import why_wrong

CHECK: TypeAdapter[Any] = TypeAdapter(checks.Check)


def check(**fields: Any) -> Any:
    return CHECK.validate_python(fields)


@pytest.mark.parametrize(
    ("fields", "answer", "right"),
    [
        ({"kind": "exact", "value": "Madrid"}, "It is **madrid**!", True),
        ({"kind": "exact", "value": "Madrid"}, "Madridista", False),
        ({"kind": "exact", "value": "Madrid", "mode": "equals"}, " MADRID. ", True),
        ({"kind": "exact", "value": "Madrid", "mode": "equals"}, "It is Madrid", False),
        ({"kind": "exact", "value": "Gödel"}, "Kurt Godel", True),
        ({"kind": "exact", "value": "5"}, "3.5", False),
        ({"kind": "exact", "value": "1200"}, "1,200 copies", True),
        ({"kind": "exact", "value": "velvet-otter"}, "velvet otter", True),
        ({"kind": "exact", "value": "yes", "reject": ["no"]}, "Yes or no.", False),
        ({"kind": "exact", "value": "yes", "reject": ["no"]}, "Yes, notably.", True),
        ({"kind": "exact", "value": "a", "aliases": ["b"]}, "B", True),
        ({"kind": "numeric", "value": 42}, "6 * 7 = 42.", True),
        ({"kind": "numeric", "value": 42}, "42, since 6 * 7", False),
        ({"kind": "numeric", "value": 42, "take": "first"}, "42, since 6 * 7", True),
        ({"kind": "numeric", "value": -3}, "x=\u22123", True),
        ({"kind": "numeric", "value": 3}, "5-3", True),
        ({"kind": "numeric", "value": 1234.5}, "$1,234.50", True),
        ({"kind": "numeric", "value": 0.5}, "about .5", True),
        ({"kind": "numeric", "value": 42}, "the answer is...42", True),
        ({"kind": "numeric", "value": 2}, "H2O", False),
        ({"kind": "numeric", "value": 10, "tolerance": 0.5}, "10.4", True),
        ({"kind": "numeric", "value": 10, "tolerance": 0.5}, "10.6", False),
        ({"kind": "numeric", "value": 0.3, "tolerance": 0.1}, "0.4", True),
        ({"kind": "numeric", "value": 10**9}, "1000000001", False),
        ({"kind": "regex", "pattern": "ab+c"}, "xABBC", False),
        ({"kind": "regex", "pattern": "ab+c", "ignore_case": True}, "xABBC", True),
        ({"kind": "regex", "pattern": "ab+c", "mode": "fullmatch"}, " abbc\n", True),
        ({"kind": "regex", "pattern": "ab+c", "mode": "fullmatch"}, "xabbc", False),
        ({"kind": "json", "schema": {"type": "object"}}, 'Sure: {"a": 1} there.', True),
        ({"kind": "json", "schema": {"type": "object"}}, "{not json} {}", True),
        ({"kind": "json", "strict": True, "schema": {"type": "array"}}, "```json\n[1]\n```", True),
        ({"kind": "json", "strict": True, "schema": {"type": "array"}}, "here: [1]", False),
        ({"kind": "json", "schema": {"enum": [[1]]}}, "[1.0]", True),
        ({"kind": "json", "schema": {"enum": [[1]]}}, "[true]", False),
        ({"kind": "json", "schema": {"items": {"type": "integer"}}}, "[1, 2.5]", False),
        ({"kind": "json", "schema": {"items": {"type": ["integer", "null"]}}}, "[1, null]", True),
        ({"kind": "json", "schema": {"minItems": 2, "maxItems": 2}}, "[1]", False),
        ({"kind": "json", "schema": {"items": {"minimum": 1, "maximum": 5}}}, "[6]", False),
        ({"kind": "json", "schema": {"items": {"pattern": "^b"}}}, '["ab"]', False),
        ({"kind": "json", "schema": {"required": ["a"]}}, '{"b": 1}', False),
        ({"kind": "json", "schema": {"additionalProperties": False}}, '{"b": 1}', False),
        ({"kind": "json", "schema": {"properties": {"a": {"type": "null"}}}}, '{"a": 1}', False),
    ],
)
def test_check_answer(fields: dict[str, Any], answer: str, right: bool) -> None:
    assert checks.check_answer(check(**fields), answer) is right


CHECKS = [
    check(kind="exact", value="Madrid", reject=["Paris"]),
    check(kind="exact", value="Madrid", mode="equals"),
    check(kind="regex", pattern=r"(\w+\s?)*!!"),
    check(kind="numeric", value=7),
    check(kind="numeric", value=7, take="first"),
    check(kind="json", schema={"type": "object", "properties": {"a": {"items": {}}}}),
    check(kind="json", schema={"enum": [[1]]}, strict=True),
]
HOSTILE = [
    "\0" * 100_000,
    "[" * 100_000,
    '{"a":' * 50_000,
    "9" * 200_000,
    "1e999",
    "-" * 200_000,
    "a" * 200_000,
    "\ufdfa" * 40_000,
    "\ud800 lone surrogate",
    "{" + '"a":1,' * 20_000,
]


@pytest.mark.parametrize("index", range(len(HOSTILE)))
def test_hostile_answers_are_wrong_and_do_not_raise(index: int) -> None:
    assert [checks.check_answer(c, HOSTILE[index]) for c in CHECKS] == [False] * len(CHECKS)
    for told in (why_wrong(c, HOSTILE[index]) for c in CHECKS):
        assert told
        assert len(told.encode()) < 2000


def test_no_answer_is_wrong() -> None:
    assert not any(checks.check_answer(c, None) for c in CHECKS)


def test_catastrophic_pattern_ends() -> None:
    assert checks.check_answer(check(kind="regex", pattern=r"(a|a)*b"), "a" * 60) is False


@given(st.text(max_size=200))
def test_check_answer_is_pure_and_boolean(answer: str) -> None:
    first = [checks.check_answer(c, answer) for c in CHECKS]
    assert [not why_wrong(c, answer) for c in CHECKS] == first
    assert first == [checks.check_answer(c, answer) for c in CHECKS]
    assert all(isinstance(result, bool) for result in first)


@given(st.text(max_size=100))
def test_normalize_is_idempotent_and_ignores_case_and_space(text: str) -> None:
    once = checks.normalize(text)
    assert checks.normalize(once) == once
    assert checks.normalize(f"  {text}\n\t") == once
    assert checks.normalize(text.casefold()) == once


@given(st.text(min_size=1, max_size=40).filter(checks.normalize), st.text(max_size=40))
def test_the_expected_text_itself_is_right(value: str, around: str) -> None:
    for mode in ("equals", "contains"):
        assert checks.check_answer(check(kind="exact", value=value, mode=mode), value)
    assert checks.check_answer(check(kind="exact", value=value), f"{around} : {value} : {around}")


@given(st.integers(-(10**12), 10**12) | st.floats(-1e6, 1e6).map(lambda x: round(x, 3)))
def test_a_number_is_found_however_it_is_written(value: float) -> None:
    numeric = check(kind="numeric", value=value)
    assert checks.check_answer(numeric, f"First 1, then the result is {value:,}.")
    assert checks.check_answer(numeric, f"{value:f}")
    assert not checks.check_answer(numeric, f"{value + 1:f}")


JSONISH = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text('abé\\"{[', max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner),
    max_leaves=8,
)


@given(st.lists(JSONISH, max_size=3) | st.dictionaries(st.text("ab", max_size=2), JSONISH))
def test_json_equal_to_an_enum_fits_it(value: Any) -> None:
    exact = check(kind="json", schema={"enum": [value]})
    assert checks.check_answer(exact, json.dumps(value))
    assert checks.check_answer(exact, f"Here you are:\n```json\n{json.dumps(value, indent=1)}\n```")
    assert not checks.check_answer(exact, json.dumps([value, "and more"]))


def test_a_catastrophic_pattern_in_a_schema_ends() -> None:
    shape = {"items": {"pattern": r"^(\w+\s?)*$"}}
    assert (
        checks.check_answer(check(kind="json", schema=shape), json.dumps(["a" * 60 + "!"])) is False
    )


def test_a_value_too_deep_for_a_message_is_wrong() -> None:
    strings = check(kind="json", schema={"properties": {"a": {"type": "string"}}})
    for depth in (10, 500, 900, 2000):
        assert checks.check_answer(strings, '{"a":' + "[" * depth + "]" * depth + "}") is False


@pytest.mark.parametrize("keyword", ["$ref", "$dynamicRef", "allOf", "patternProperties", "format"])
def test_what_a_schema_may_not_hold_is_refused(keyword: str) -> None:
    with pytest.raises(ValueError, match=r"Extra inputs|extra_forbidden"):
        check(kind="json", schema={keyword: "https://example.org/schema"})


OBJECT = {
    "type": "object",
    "properties": {
        "name": {"pattern": "(?i)^Tom$"},
        "age": {"enum": [30]},
        "tags": {"maxItems": 1},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("fields", "answer", "told"),
    [
        (
            {"kind": "exact", "value": "yes", "reject": ["no", "maybe"]},
            "Yes, or no.",
            'it says "no", which a right answer does not',
        ),
        ({"kind": "exact", "value": "Madrid"}, "Rome", 'it does not hold "Madrid" as whole words'),
        (
            {"kind": "exact", "value": "a", "aliases": ["b"], "mode": "equals"},
            "a, or so",
            'it says more than "a"',
        ),
        ({"kind": "exact", "value": "a", "mode": "equals"}, "c", 'it is not "a"'),
        ({"kind": "exact", "value": "Ab", "mode": "identical"}, "ab.", 'letter by letter "Ab"'),
        (
            {"kind": "numeric", "value": 42},
            "4, then 1,243",
            "the last number in it is 1243, wanted",
        ),
        ({"kind": "numeric", "value": 42, "tolerance": 0.5}, "43", "wanted 42 ± 0.5"),
        ({"kind": "numeric", "value": 42}, "none", "there is no number in it"),
        ({"kind": "regex", "pattern": r"\bGARDEN\b"}, "a lawn", 'it does not hold "GARDEN"'),
        (
            {"kind": "regex", "pattern": r"\bGARDEN\b"},
            "garden",
            "in other capital or small letters",
        ),
        ({"kind": "regex", "pattern": r"\b(hi|hello)\b"}, "bye", 'not hold "hi" or "hello"'),
        (
            {"kind": "regex", "pattern": r"\W*ready\W*", "mode": "fullmatch"},
            "I am ready",
            'it has "ready", but more than that',
        ),
        ({"kind": "regex", "pattern": "a{3}b+"}, "ab", "what the pattern a{3}b+ describes"),
        ({"kind": "json", "schema": OBJECT}, "Tom, 30", "there is no JSON object or array in it"),
        ({"kind": "json", "schema": OBJECT, "strict": True}, "{}!", "as a whole it is not JSON"),
        ({"kind": "json", "schema": OBJECT}, '{"name": "Tom"}', 'the JSON lacks "age"'),
        ({"kind": "json", "schema": OBJECT}, '{"name": "Tom", "age": 31}', "age is 31, wanted 30"),
        (
            {"kind": "json", "schema": OBJECT},
            '{"name": "Tim", "age": 30, "x": 1}',
            'the JSON also has "x"',
        ),
        (
            {"kind": "json", "schema": OBJECT},
            '{"name": "Tim", "age": 30}',
            'name is "Tim", wanted "T',
        ),
        (
            {"kind": "json", "schema": {"items": {"type": "integer"}}},
            '[1, "\\ud800"]',
            '[1] is "?", wanted integer',
        ),
        ({"kind": "json", "schema": {"maxItems": 1}}, "[1, 2]", "has 2 items, wanted at most 1"),
        (
            {"kind": "json", "schema": {"items": {"minimum": 3}}},
            "[1]",
            "[0] is 1, wanted at least 3",
        ),
        (
            {"kind": "json", "schema": {"items": {"type": "null"}}},
            "[1, 2, 3, 4, 5]",
            ", and 2 more",
        ),
        ({"kind": "exact", "value": "a"}, " \n", "there is no answer"),
    ],
)
def test_a_wrong_answer_says_why(fields: dict[str, Any], answer: str, told: str) -> None:
    assert told in why_wrong(check(**fields), answer)


def test_a_pattern_that_takes_too_long_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*_: object) -> bool:
        raise TimeoutError

    pattern = check(kind="regex", pattern="ab")
    monkeypatch.setattr(checks, "find", slow)
    monkeypatch.setattr("phi3_mlflow.evaluation.wrong.find", slow)
    assert why_wrong(pattern, "abc") == "the pattern was not done with it within 0.5 s"
