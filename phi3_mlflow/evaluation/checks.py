"""How an answer is checked: what a check may hold, and whether an answer passes it."""

from __future__ import annotations

import contextlib
import json
import re
import unicodedata
from decimal import Decimal
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

import regex
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    field_validator,
    model_validator,
)
from pydantic.alias_generators import to_camel

from phi3_mlflow.rows.strict_json import no_constant

if TYPE_CHECKING:
    from collections.abc import Iterator

REGEX_SECONDS = 0.5  # a pattern that needs longer on one answer counts as "does not match"
MAX_ANSWER_CHARS = 40_000  # an endless answer is judged by this much of its head (or tail)

Text = Annotated[str, Field(min_length=1)]
TypeName = Literal["object", "array", "string", "number", "integer", "boolean", "null"]


class StrictModel(BaseModel):
    """Base of what a row of a file may hold: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ExactCheck(StrictModel):
    """Right when the normalized answer equals, or contains as whole words, `value` or an alias.

    With the mode `identical` nothing is normalized but the blanks around it. An answer that also
    contains one of `reject` is wrong: that is how naming every label of a classification is kept
    from counting.
    """

    kind: Literal["exact"]
    value: Text
    mode: Literal["equals", "contains", "identical"] = "contains"
    aliases: tuple[Text, ...] = ()
    reject: tuple[Text, ...] = ()

    @model_validator(mode="after")
    def _something_left(self) -> ExactCheck:
        compared = () if self.mode == "identical" else (self.value, *self.aliases)
        if not all(normalize(text) for text in (*compared, *self.reject)):
            raise ValueError("should hold a letter or a digit, not punctuation alone")
        return self


class RegexCheck(StrictModel):
    """Right when `pattern` (syntax of the `regex` module) is found in the stripped answer."""

    kind: Literal["regex"]
    pattern: Text
    ignore_case: bool = False
    mode: Literal["search", "fullmatch"] = "search"

    @model_validator(mode="after")
    def _usable(self) -> RegexCheck:
        try:
            found = find(self.pattern, "", self.ignore_case, self.mode)
        except (regex.error, TimeoutError) as error:
            raise ValueError(f"pattern is not a usable regular expression: {error}") from None
        if found:
            raise ValueError("pattern should not match an empty answer")
        return self


class NumericCheck(StrictModel):
    """Right when the last (or first) number in the answer is within `tolerance` of `value`."""

    kind: Literal["numeric"]
    value: float
    tolerance: Annotated[float, Field(ge=0)] = 0.0
    take: Literal["last", "first"] = "last"


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Shape(StrictModel):
    """The part of JSON Schema understood here, each keyword with its meaning there.

    Any other keyword is refused: it would silently check nothing.
    """

    model_config = ConfigDict(alias_generator=to_camel, validate_by_name=False)
    type: Annotated[tuple[TypeName, ...], BeforeValidator(_listed)] = ()
    properties: dict[str, Shape] = {}
    required: tuple[str, ...] = ()
    additional_properties: bool = True
    items: Shape | None = None
    enum: Annotated[tuple[JsonValue, ...], Field(min_length=1)] | None = None
    pattern: str | None = None
    min_items: Annotated[int, Field(ge=0)] = 0
    max_items: Annotated[int, Field(ge=0)] | None = None
    minimum: float | None = None
    maximum: float | None = None

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        try:
            regex.compile(value or "")
        except regex.error as error:
            raise ValueError(f"should be a regular expression: {error}") from None
        return value


class JsonCheck(StrictModel):
    """Right when the first JSON object or array in the answer has the shape given as `schema`.

    With `strict` the whole answer has to be the JSON; a Markdown fence around it is allowed.
    """

    kind: Literal["json"]
    shape: Annotated[Shape, Field(alias="schema")]
    strict: bool = False


Check = Annotated[ExactCheck | RegexCheck | NumericCheck | JsonCheck, Field(discriminator="kind")]


def describe(check: Check) -> str:
    """What a right answer looks like, in words."""
    if isinstance(check, ExactCheck):
        others = f" or {', '.join(check.aliases)}" if check.aliases else ""
        return f"{'' if check.mode == 'contains' else 'exactly '}{check.value}{others}"
    if isinstance(check, NumericCheck):
        slack = f" ± {check.tolerance:g}" if check.tolerance else ""
        return f"the number {check.value:g}{slack}"
    if isinstance(check, RegexCheck):
        return f"something that matches {check.pattern}"
    return f"JSON: {check.shape.model_dump_json(by_alias=True, exclude_defaults=True)}"


_POINT = re.compile(r"[0-9]\.[0-9]")


def normalize(text: str) -> str:
    """Fold what an exact match should not depend on; idempotent.

    Returns:
        The text in lower case, without Latin accents and punctuation, thousands commas closed up,
        one space between words. A decimal point, and the signs + = < > $ and their kin, stay:
        "3.5" must not contain the word "5".
    """
    text = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    text = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", text)
    out = []
    for index, char in enumerate(text):
        kind = unicodedata.category(char)
        if kind in ("Sm", "Sc"):
            out.append(f" {char} ")
        elif kind[0] in "LNM" or (char == "." and _POINT.match(text, max(index - 1, 0))):
            out.append("" if "\u0300" <= char <= "\u036f" else char)
        else:
            out.append(" ")
    return " ".join("".join(out).split())


def check_answer(check: Check, answer: str | None) -> bool:
    """Say whether a model's answer is right.

    Args:
        check: a validated check.
        answer: as the model gave it, however hostile: empty, None, huge, full of NULs, deeply
            nested.

    Returns:
        The same on every call; only a pattern that runs into `REGEX_SECONDS` depends on the
        machine, and counts as wrong.
    """
    if not isinstance(answer, str):
        return False
    head = answer[:MAX_ANSWER_CHARS]
    try:
        if isinstance(check, ExactCheck):
            return len(answer) <= MAX_ANSWER_CHARS and _exact(check, head)
        if isinstance(check, NumericCheck):
            return _numeric(check, answer)
        if isinstance(check, RegexCheck):
            return find(check.pattern, head.strip(), check.ignore_case, check.mode)
        return any(_fits(value, check.shape) for value in json_values(head, check.strict))
    except TimeoutError:
        return False


def _exact(check: ExactCheck, answer: str) -> bool:
    given = f" {normalize(answer)} "
    if any(f" {normalize(text)} " in given for text in check.reject):
        return False
    if check.mode == "identical":
        return answer.strip() in {text.strip() for text in (check.value, *check.aliases)}
    wanted = [f" {normalize(text)} " for text in (check.value, *check.aliases)]
    return any(w == given if check.mode == "equals" else w in given for w in wanted)


# A sign counts only when no letter or digit stands before it ("5-3" holds 5 and 3, "x=-3" holds
# -3); digits inside a word or a version ("H2O", "v1.2") are not numbers.
_NUMBER = re.compile(
    r"(?<![0-9]\.)(?<![^\W_])[-+]?"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<!\.)\.[0-9]+)"
    r"(?:[eE][-+]?[0-9]{1,4}(?![0-9]))?"
)


def number_in(check: NumericCheck, answer: str) -> str | None:
    """The number of an answer that counts, without commas; None when there is none."""
    first = check.take == "first"
    judged = answer[:MAX_ANSWER_CHARS] if first else answer[-MAX_ANSWER_CHARS:]
    number = None
    for match in _NUMBER.finditer(judged.replace("\u2212", "-")):
        number = match.group().replace(",", "")
        if first:
            break
    return number


def _numeric(check: NumericCheck, answer: str) -> bool:
    number = number_in(check, answer)
    if number is None:
        return False
    # Decimals, because floats make 0.1 + 0.2 unequal to 0.3 and need a slack that hides errors.
    given, value = Decimal(number), Decimal(repr(check.value))
    return abs(given - value) <= Decimal(repr(check.tolerance))


def find(pattern: str, text: str, ignore_case: bool, mode: str) -> bool:
    """Whether a pattern is found in a text, or matches all of it.

    Raises:
        TimeoutError: it was not done within `REGEX_SECONDS`.
    """
    compiled = regex.compile(pattern, regex.IGNORECASE if ignore_case else 0)
    find = compiled.fullmatch if mode == "fullmatch" else compiled.search
    return find(text, timeout=REGEX_SECONDS) is not None


_JSON = json.JSONDecoder(parse_constant=no_constant)
_FENCE = re.compile(r"\s*```[A-Za-z]*\s*\n(.*)\n\s*```\s*", re.DOTALL)


def json_values(answer: str, strict: bool) -> Iterator[Any]:
    """Give the JSON the answer holds: at most one value."""
    if strict:
        fenced = _FENCE.fullmatch(answer)
        with contextlib.suppress(ValueError, RecursionError):
            yield _JSON.decode((fenced.group(1) if fenced else answer).strip())
        return
    starts = (match.start() for match in re.finditer(r"[\[{]", answer))
    for start, _ in zip(starts, range(64), strict=False):
        try:
            yield _JSON.raw_decode(answer, start)[0]
            return
        except (ValueError, RecursionError):
            continue


def _fits(value: Any, shape: Shape) -> bool:
    try:
        return bool(validator_of(shape).is_valid(value))
    except RecursionError:  # an error repeats the value in its message, however deep it is
        return False


def validator_of(shape: Shape) -> Any:
    """A validator of jsonschema's for a shape."""
    schema = shape.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return _validator_class()(schema, registry=_no_references())


@lru_cache
def _validator_class() -> Any:
    """JSON Schema's rules, except that a pattern may not take forever."""
    import jsonschema

    validators: Any = jsonschema.validators

    def pattern(_: Any, wanted: str, value: Any, __: Any) -> Iterator[Exception]:
        if isinstance(value, str) and not find(wanted, value, False, "search"):
            yield jsonschema.ValidationError("does not match")

    return validators.extend(jsonschema.Draft202012Validator, {"pattern": pattern})


@lru_cache
def _no_references() -> Any:
    """A registry that resolves nothing: a `Shape` cannot hold a reference, and none is followed."""
    from referencing import Registry

    return Registry()
