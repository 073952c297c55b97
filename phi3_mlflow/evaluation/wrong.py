"""Why an answer is wrong, in words: what its check wanted, and what was found in its place."""

from __future__ import annotations

import json
import re
from itertools import islice
from typing import TYPE_CHECKING, Any

from phi3_mlflow.evaluation.checks import (
    MAX_ANSWER_CHARS,
    REGEX_SECONDS,
    Check,
    ExactCheck,
    NumericCheck,
    RegexCheck,
    Shape,
    check_answer,
    find,
    json_values,
    normalize,
    number_in,
    validator_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

_MOST_DIFFERENCES = 3
_LONGEST_QUOTED = 80  # characters


def why_wrong(check: Check, answer: str | None) -> str:
    """Say why an answer does not pass its check.

    Args:
        check: a validated check.
        answer: as the model gave it, however hostile.

    Returns:
        A short sentence without a full stop; empty exactly when `check_answer` says it is right.
    """
    if check_answer(check, answer):
        return ""
    if answer is None or not answer.strip():
        return "there is no answer"
    head = answer[:MAX_ANSWER_CHARS]
    try:
        if isinstance(check, ExactCheck):
            return _exact(check, answer)
        if isinstance(check, NumericCheck):
            return _numeric(check, answer)
        if isinstance(check, RegexCheck):
            return _regex(check, head.strip())
        return _json(check.shape, head, strict=check.strict)
    except TimeoutError:
        return f"the pattern was not done with it within {REGEX_SECONDS:g} s"


def _exact(check: ExactCheck, answer: str) -> str:
    if len(answer) > MAX_ANSWER_CHARS:
        return f"it has more than {MAX_ANSWER_CHARS:,} characters"
    given = f" {normalize(answer)} "
    wanted = (check.value, *check.aliases)
    if hit := [text for text in check.reject if f" {normalize(text)} " in given]:
        return f"it says {_any(hit, 'and')}, which a right answer does not"
    held = [text for text in wanted if f" {normalize(text)} " in given]
    if check.mode == "contains":
        return f"it does not hold {_any(wanted)} as whole words"
    if check.mode == "identical" and any(f" {normalize(text)} " == given for text in held):
        return f"it is not letter by letter {_any(wanted)}"
    return f"it says more than {_any(held)}" if held else f"it is not {_any(wanted)}"


def _numeric(check: NumericCheck, answer: str) -> str:
    found = number_in(check, answer)
    if found is None:
        return "there is no number in it"
    slack = f" ± {check.tolerance:g}" if check.tolerance else ""
    return f"the {check.take} number in it is {_cut(found)}, wanted {check.value:.15g}{slack}"


# What surrounds a word in a pattern, and says no more than that it stands alone.
_EDGE = r"(?:\\b|\\W\*|\(\?<!\\[wd]\)|\(\?!\\[wd]\)|\^|\$)*"
_PLAIN = re.compile(rf"{_EDGE}(\(?)(?P<words>(?:[\w ,;:'/|-]|\\[.!?*+()\[\]])+?)(\)?){_EDGE}")


def _regex(check: RegexCheck, answer: str) -> str:
    wanted, plain = _in_words(check.pattern)
    if not check.ignore_case and find(check.pattern, answer, True, check.mode):
        return f"it has {wanted}, but in other capital or small letters"
    if check.mode == "fullmatch" and find(check.pattern, answer, check.ignore_case, "search"):
        return f"it has {wanted}, but more than that"
    if check.mode == "fullmatch":
        return f"it is not {wanted}" if plain else f"as a whole it is not {wanted}"
    return f"it does not hold {wanted}" if plain else f"nothing in it is {wanted}"


def _in_words(pattern: str) -> tuple[str, bool]:
    """What a pattern looks for; and whether that are plain words."""
    match = _PLAIN.fullmatch(pattern)
    if match is None or bool(match[1]) != bool(match[3]):
        return f"what the pattern {_cut(pattern)} describes", False
    return _any([re.sub(r"\\(.)", r"\1", word) for word in match["words"].split("|")]), True


def _json(shape: Shape, answer: str, *, strict: bool) -> str:
    values = list(json_values(answer, strict))
    if not values:
        return "as a whole it is not JSON" if strict else "there is no JSON object or array in it"
    try:
        errors = islice(validator_of(shape).iter_errors(values[0]), 20)
        told = list(dict.fromkeys(_difference(error) for error in errors))
    except RecursionError:
        return "its JSON is nested too deeply"
    more = f", and {len(told) - _MOST_DIFFERENCES} more" if len(told) > _MOST_DIFFERENCES else ""
    return "; ".join(told[:_MOST_DIFFERENCES]) + more


def _difference(error: Any) -> str:
    """One place where the JSON is not what was wanted."""
    where, value, wanted = _path(error.absolute_path), error.instance, error.validator_value
    kind = error.validator
    if kind == "required":
        return f"{where} lacks {_any([name for name in wanted if name not in value], 'and')}"
    if kind == "additionalProperties":
        known = error.schema.get("properties", {})
        return f"{where} also has {_any([name for name in value if name not in known], 'and')}"
    if kind in ("minItems", "maxItems"):
        side = "at least" if kind == "minItems" else "at most"
        return f"{where} has {len(value)} items, wanted {side} {wanted}"
    found = f"{where} is {_shown(value)}, wanted"
    if kind in ("minimum", "maximum"):
        return f"{found} {'at least' if kind == 'minimum' else 'at most'} {_shown(wanted)}"
    if kind == "enum":
        return f"{found} {' or '.join(_shown(item) for item in wanted[:8])}"
    if kind == "type":
        names = [wanted] if isinstance(wanted, str) else wanted
        return f"{found} {' or '.join(names)}"
    return f"{found} {_in_words(str(wanted).removeprefix('(?i)'))[0]}"


def _path(path: Iterable[str | int]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{_cut(part)}" for part in path)
    return text.removeprefix(".") or "the JSON"


def _any(texts: Iterable[str], word: str = "or") -> str:
    shown = [f'"{_cut(text)}"' for text in texts]
    if len(shown) > 6:
        shown = [*shown[:5], f"{len(shown) - 5} more"]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} {word} {shown[-1]}"


def _shown(value: Any) -> str:
    return _cut(json.dumps(value, ensure_ascii=False))


def _cut(text: str) -> str:
    # JSON can spell half of a character, which no file takes.
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= _LONGEST_QUOTED else f"{text[:_LONGEST_QUOTED]}…"
