"""JSON schemas that answers are held to: bounded before a grammar is made of them.

The grammar's compiler writes every demanded item out, so a schema of a few bytes can take
gigabytes, and where an allocation fails the process is gone with everybody's answers. What no
answer could hold is refused here, and what means nothing for an answer of this length is left out.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

MOST_CHARACTERS = 64_000
MOST_PARTS = 2000
"""Schemas within a schema; optional properties cost their square."""
DEEPEST = 64
MOST_REPEATS = 10_000
MOST_MATCHED = 20_000
"""Characters that all patterns of a schema write out, repeats of repeats multiplied."""
MOST_COMBINED = 128
"""Alternatives of anyOf that allOf combines with one another; each is compiled."""
MOST_TOGETHER = 4
"""Patterns that one text has to match, all of them."""
MOST_MULTIPLE = 2000
"""Of multipleOf, all of a schema together: a number is followed digit by digit with that many
states. Zeros at its end cost nothing."""
LONGEST_PATTERN = 2000
CHARACTERS_PER_TOKEN = 16
"""That a token of an answer can hold; no vocabulary has longer ones that JSON is made of."""

COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""How an answer is spaced. Between any two parts any number of blanks is valid JSON, and small
models go on with blanks until their tokens are spent."""

_REPEAT = re.compile(r"\{(\d+)(?:,(\d*))?\}")
_TOKENS = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]|\{\d+(?:,\d*)?\}|.", re.DOTALL)
_MOST_STEPS = 20_000
_VALUES = ("const", "default", "enum", "examples")
_WHOLE = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")


def bounded(schema: Mapping[str, Any], room: int) -> tuple[str, list[str]]:
    """A schema as the grammar's compiler may have it.

    Args:
        schema: as the client sent it.
        room: tokens that an answer may have.

    Returns:
        The schema as text, and what is wrong with it, one sentence each.
    """
    text = json.dumps(schema)
    if len(text) > MOST_CHARACTERS:
        return text, [f"{len(text)} characters, at most {MOST_CHARACTERS} are taken"]
    problems = _Look(room * CHARACTERS_PER_TOKEN).problems(schema)
    if problems:
        return text, problems
    kept = _clamped(schema, room)
    kept.setdefault("x-guidance", COMPACT)
    return json.dumps(kept), []


class _Look:
    """A walk through a schema.

    Args:
        most: characters that an answer can have.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._parts = 0
        self._problems: list[str] = []
        self._steps = 0
        self._known: dict[str, float] = {}
        self._multiples: list[int] = []
        self._matched = 0.0
        self._combined = 0.0
        self._together = 0
        self._known_ways: dict[str, tuple[float, int]] = {}

    def problems(self, schema: Mapping[str, Any]) -> list[str]:
        self._walk(schema, 0)
        if self._problems:
            return self._problems
        if problem := self._costs(schema):
            return [problem]
        least = self._least(schema, schema, ())
        if self._steps > _MOST_STEPS:
            return ["its references ($ref) are too entangled"]
        if least == math.inf:
            return ["no answer follows it: it demands itself ($ref) without an end"]
        if least > self._most:
            return [
                f"the shortest answer that follows it has {least:.0f} characters, and there is "
                f"room for some {self._most}"
            ]
        return []

    def _walk(self, value: Any, depth: int) -> None:
        if self._problems:
            return
        if depth > DEEPEST:
            self._problems.append(f"it is nested more than {DEEPEST} deep")
        elif isinstance(value, Mapping):
            self._parts += 1
            if self._parts > MOST_PARTS:
                self._problems.append(f"it has more than {MOST_PARTS} parts")
                return
            self._check(value)
            for item in value.values():
                self._walk(item, depth + 1)
        elif isinstance(value, list):
            for item in value:
                self._walk(item, depth + 1)

    def _costs(self, schema: Mapping[str, Any]) -> str:
        """What would take the grammar's compiler too long, and everybody else with it."""
        states = max(math.lcm(*self._multiples), sum(self._multiples)) if self._multiples else 0
        if states > MOST_MULTIPLE:
            return f"multipleOf takes {states} states in all, at most {MOST_MULTIPLE} are taken"
        if self._matched > MOST_MATCHED:
            return (
                f"its patterns match {self._matched:.3g} characters, at most {MOST_MATCHED} are "
                "taken"
            )
        self._ways(schema, schema, ())
        if self._steps > _MOST_STEPS:
            return "its references ($ref) are too entangled"
        if self._combined > MOST_COMBINED:
            return f"allOf combines more than {MOST_COMBINED} alternatives"
        if self._together > MOST_TOGETHER:
            return f"allOf combines {self._together} patterns, at most {MOST_TOGETHER} are taken"
        self._steps = 0
        return ""

    def _ways(
        self, root: Mapping[str, Any], part: Any, inside: tuple[str, ...]
    ) -> tuple[float, int]:
        """Alternatives and patterns that stand in one place of a part, at most.

        Everything that one mapping demands holds at once: its alternatives multiply, its patterns
        add up. What is combined is counted.
        """
        self._steps += 1
        if self._steps > _MOST_STEPS:
            return 1, 0
        if isinstance(part, list):
            return _most([self._ways(root, one, inside) for one in part])
        if not isinstance(part, Mapping):
            return 1, 0
        demands: list[tuple[float, int]] = [(1, int(isinstance(part.get("pattern"), str)))]
        for name in ("anyOf", "oneOf"):
            if isinstance(part.get(name), list):
                found = [self._ways(root, one, inside) for one in part[name]]
                demands.append((sum(ways for ways, _ in found), _most(found)[1]))
        if isinstance(part.get("allOf"), list):
            demands += [self._ways(root, one, inside) for one in part["allOf"]]
        reference = part.get("$ref")
        if isinstance(reference, str) and reference not in inside:
            if reference not in self._known_ways:
                target = _target(root, reference)
                self._known_ways[reference] = self._ways(root, target, (*inside, reference))
            demands.append(self._known_ways[reference])
        ways = math.prod(min(ways, MOST_COMBINED + 1) for ways, _ in demands)
        patterns = sum(patterns for _, patterns in demands)
        if sum(ways > 1 for ways, _ in demands) > 1:
            self._combined += ways
        self._together = max(self._together, patterns)
        rest = [
            self._ways(root, value, inside)
            for name, value in part.items()
            if name not in ("anyOf", "oneOf", "allOf", *_VALUES)
        ]
        return _most([(ways, patterns), *rest])

    def _check(self, part: Mapping[str, Any]) -> None:
        for name in _WHOLE:
            number = part.get(name, 0)
            if isinstance(number, int | float) and not 0 <= number < math.inf:
                self._problems.append(f"{name} is {number}, it must be 0 or more")
        if multiple := _digits(part.get("multipleOf")):
            self._multiples.append(multiple)
        pattern = part.get("pattern")
        if not isinstance(pattern, str):
            return
        if len(pattern) > LONGEST_PATTERN:
            self._problems.append(f"a pattern of {len(pattern)} characters, at most "
                                  f"{LONGEST_PATTERN} are taken")  # fmt: skip
        for repeat in _REPEAT.finditer(pattern):
            if max(int(number[:9]) for number in repeat.groups() if number) > MOST_REPEATS:
                self._problems.append(
                    f"a pattern repeats {repeat[0]}, at most {MOST_REPEATS} times are taken"
                )
                return
        if len(pattern) <= LONGEST_PATTERN:
            self._matched += _matched(pattern) + _whole(part.get("minLength"))

    def _least(self, root: Mapping[str, Any], part: Any, inside: tuple[str, ...]) -> float:
        """Characters of the shortest answer that follows a part, at least; infinite if none does.

        What is not understood counts as one character.
        """
        self._steps += 1
        if self._steps > _MOST_STEPS:
            return 1
        if part is False:
            return math.inf
        if not isinstance(part, Mapping):
            return 1
        least: float = 1
        reference = part.get("$ref")
        if isinstance(reference, str):
            if reference in inside:
                return math.inf
            if reference not in self._known:
                target = _target(root, reference)
                least = self._least(root, target, (*inside, reference))
                if least < math.inf:  # what demands itself may not, seen from elsewhere
                    self._known[reference] = least
            else:
                least = self._known[reference]
        for choices in (part.get("anyOf"), part.get("oneOf")):
            if isinstance(choices, list) and choices:
                least = max(least, min(self._least(root, one, inside) for one in choices))
        if isinstance(part.get("allOf"), list):
            least = max([least, *(self._least(root, one, inside) for one in part["allOf"])])
        kind = part.get("type")
        if kind == "array":
            least = max(least, self._least_array(root, part, inside))
        elif kind == "object":
            least = max(least, self._least_object(root, part, inside))
        elif kind == "string":
            least = max(least, 2 + _whole(part.get("minLength")))
        return least

    def _least_array(
        self, root: Mapping[str, Any], part: Mapping[str, Any], inside: tuple[str, ...]
    ) -> float:
        count = _whole(part.get("minItems"))
        if not count:
            return 2
        prefix = part.get("prefixItems")
        first = prefix[:count] if isinstance(prefix, list) else []
        sizes = sum(self._least(root, one, inside) for one in first)
        if rest := count - len(first):
            sizes += rest * self._least(root, part.get("items"), inside)
        return 2 + sizes + count - 1

    def _least_object(
        self, root: Mapping[str, Any], part: Mapping[str, Any], inside: tuple[str, ...]
    ) -> float:
        given, required = part.get("properties"), part.get("required")
        properties = given if isinstance(given, Mapping) else {}
        names = [str(name) for name in required] if isinstance(required, list) else []
        sizes = sum(
            len(name) + 4 + self._least(root, properties.get(name), inside) for name in set(names)
        )
        more = max(0, _whole(part.get("minProperties")) - len(set(names)))
        return 2 + sizes + 5 * more


def _whole(value: Any) -> int:
    return int(value) if isinstance(value, int | float) and value > 0 else 0


def _most(found: list[tuple[float, int]]) -> tuple[float, int]:
    """The most alternatives and the most patterns of some places."""
    return max((one for one, _ in found), default=1), max((two for _, two in found), default=0)


def _digits(value: Any) -> int:
    """A number's digits without those that only say where its point is; 0 for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return 0
    try:
        digits = Decimal(str(value)).normalize().as_tuple().digits
    except (InvalidOperation, ValueError):
        return 0
    return int("".join(map(str, digits[:30])) or 0)


def _matched(pattern: str) -> float:
    """How many characters a pattern writes out: repeats of a group count times what is in it."""
    levels: list[float] = [0]
    last: float = 0
    for token in _TOKENS.finditer(pattern):
        text = token[0]
        repeat = _REPEAT.fullmatch(text)
        if repeat:
            times = max(int(number[:9]) for number in repeat.groups() if number)
            levels[-1] += last * max(0, times - 1)
            last *= max(1, times)
        elif text == "(":
            levels.append(0)
        elif text == ")" and len(levels) > 1:
            last = levels.pop()
            levels[-1] += last
        elif text not in ("|", "*", "+", "?", "^", "$"):
            last = 1
            levels[-1] += 1
    return sum(levels)


def _target(root: Mapping[str, Any], reference: str) -> Any:
    """What a `$ref` within the schema points to; None for any other."""
    if not reference.startswith("#"):
        return None
    found: Any = root
    for name in filter(None, reference[1:].split("/")):
        if not isinstance(found, Mapping):
            return None
        found = found.get(name.replace("~1", "/").replace("~0", "~"))
    return found


def _clamped(schema: Mapping[str, Any], room: int) -> dict[str, Any]:
    """Without upper limits that an answer of this length cannot reach."""

    def inner(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {
                name: item if name in _VALUES else inner(item)
                for name, item in value.items()
                if not (name == "maxItems" and isinstance(item, int | float) and item > room)
            }
        return [inner(item) for item in value] if isinstance(value, list) else value

    kept: dict[str, Any] = inner(schema)
    return kept
