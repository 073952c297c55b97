"""The evaluation sets: what a line may hold, how files are read, how an answer is checked.

The project ships its own sets in `data/` (see `data/README.md`); a user may bring a file instead:
JSONL, CSV, Parquet, or a directory written by `datasets.Dataset.save_to_disk`.

    questions = load_questions()                    # the shipped set
    questions = load_questions("mine.csv")          # the user's own, same rules
    ok = check_answer(questions[0].check, "Paris.")
    fingerprint = digest(questions)

A row of a question file is written out in full (`id`, `category`, `messages`, `check`,
`max_tokens`) or, for the simplest case, as the two columns `prompt` and `answer`. In CSV, and
wherever a format cannot nest, `messages` and `check` are JSON text in one cell.

Nothing here knows MLflow or a model. pyarrow and datasets are imported only when such a file
is read.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlparse
from urllib.request import url2pathname

import regex
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.alias_generators import to_camel

from phi3_mlflow.errors import UserError, problem_list

DATA_DIR = Path(__file__).resolve().parents[2] / "data"
REGEX_SECONDS = 0.5  # a pattern that needs longer on one answer counts as "does not match"
MAX_ANSWER_CHARS = 40_000  # an endless answer is judged by this much of its head (or tail)
MAX_PROBLEMS_SHOWN = 200
_NOTHING = object()  # stands for "there is no value to show"

Text = Annotated[str, Field(min_length=1)]
TypeName = Literal["object", "array", "string", "number", "integer", "boolean", "null"]
Identifier = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,99}$")]


# --- what a line may hold ---------------------------------------------------------------------


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Message(_Line):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Text


class ExactCheck(_Line):
    """Right when the normalized answer equals, or contains as whole words, `value` or an alias.

    An answer that also contains one of `reject` is wrong: that is how naming every label of a
    classification is kept from counting.
    """

    kind: Literal["exact"]
    value: Text
    mode: Literal["equals", "contains"] = "contains"
    aliases: tuple[Text, ...] = ()
    reject: tuple[Text, ...] = ()

    @field_validator("value", "aliases", "reject")
    @classmethod
    def _something_left(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for text in (value,) if isinstance(value, str) else value:
            if not normalize(text):
                raise ValueError("should hold a letter or a digit, not punctuation alone")
        return value


class RegexCheck(_Line):
    """Right when `pattern` (syntax of the `regex` module) is found in the stripped answer."""

    kind: Literal["regex"]
    pattern: Text
    ignore_case: bool = False
    mode: Literal["search", "fullmatch"] = "search"

    @model_validator(mode="after")
    def _usable(self) -> RegexCheck:
        try:
            found = _find(self.pattern, "", self.ignore_case, self.mode)
        except (regex.error, TimeoutError) as error:
            raise ValueError(f"pattern is not a usable regular expression: {error}") from None
        if found:
            raise ValueError("pattern should not match an empty answer")
        return self


class NumericCheck(_Line):
    """Right when the last (or first) number in the answer is within `tolerance` of `value`."""

    kind: Literal["numeric"]
    value: float
    tolerance: Annotated[float, Field(ge=0)] = 0.0
    take: Literal["last", "first"] = "last"


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Shape(_Line):
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


class JsonCheck(_Line):
    """Right when the first JSON object or array in the answer has the shape given as `schema`.

    With `strict` the whole answer has to be the JSON; a Markdown fence around it is allowed.
    """

    kind: Literal["json"]
    shape: Annotated[Shape, Field(alias="schema")]
    strict: bool = False


Check = Annotated[ExactCheck | RegexCheck | NumericCheck | JsonCheck, Field(discriminator="kind")]


def _conversation(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    if not messages or messages[-1].role != "user":
        raise ValueError("the last message should have the role 'user': it is what is answered")
    if any(message.role == "system" for message in messages[1:]):
        raise ValueError("the role 'system' is allowed in the first message only")
    return messages


class Question(_Line):
    """One question with a checkable answer; `quick` marks the subset of a quick run."""

    id: Identifier
    category: Identifier
    messages: tuple[Message, ...]
    check: Check
    max_tokens: Annotated[int, Field(ge=1, le=4096)] = 64
    level: Literal["easy", "medium", "hard"] = "medium"
    quick: bool = False

    _ends_with_user = field_validator("messages")(_conversation)


class HeldoutText(_Line):
    """One document for perplexity and divergence."""

    id: Identifier
    register_: Annotated[Identifier, Field(alias="register")] = "other"
    text: Text
    quick: bool = False


class CalibrationText(_Line):
    """One calibration text, as plain `text` or as a conversation in `messages`."""

    id: Identifier
    register_: Annotated[Identifier, Field(alias="register")] = "other"
    text: Text | None = None
    messages: Annotated[tuple[Message, ...], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> CalibrationText:
        if (self.text is None) == (self.messages is None):
            raise ValueError("should have exactly one of 'text' and 'messages'")
        return self


class Needle(_Line):
    """A recipe for a long prompt with one sentence to find in it; see `build_needle_prompt`."""

    id: Identifier
    target_tokens: Annotated[int, Field(ge=100, le=1_000_000)]
    depth: Annotated[float, Field(ge=0, le=1)]
    needle: Text
    question: Text
    check: Check
    max_tokens: Annotated[int, Field(ge=1, le=4096)] = 32
    quick: bool = False


Line = TypeVar("Line", Question, HeldoutText, CalibrationText, Needle)


# --- checking an answer -----------------------------------------------------------------------

_POINT = re.compile(r"[0-9]\.[0-9]")


def normalize(text: str) -> str:
    """Fold what an exact match should not depend on; idempotent.

    Input: any string. Output: lower case, Latin accents and punctuation gone, thousands commas
    closed up, one space between words. A decimal point, and the signs + = < > $ and their kin,
    stay: "3.5" must not contain the word "5". Errors: none.
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

    Input: a validated check and the answer as the model gave it, however hostile: empty, None,
    huge, full of NULs, deeply nested. Output: True or False, the same on every call (only a
    pattern that runs into `REGEX_SECONDS` depends on the machine; it counts as False).
    Errors: none.
    """
    if not isinstance(answer, str):
        return False
    head = answer[:MAX_ANSWER_CHARS]
    try:
        if isinstance(check, ExactCheck):
            return len(answer) <= MAX_ANSWER_CHARS and _exact(check, head)
        if isinstance(check, NumericCheck):
            return _numeric(check, head if check.take == "first" else answer[-MAX_ANSWER_CHARS:])
        if isinstance(check, RegexCheck):
            return _find(check.pattern, head.strip(), check.ignore_case, check.mode)
        return any(_fits(value, check.shape) for value in _json_values(head, check.strict))
    except TimeoutError:
        return False


def _exact(check: ExactCheck, answer: str) -> bool:
    given = f" {normalize(answer)} "
    wanted = [f" {normalize(text)} " for text in (check.value, *check.aliases)]
    if any(f" {normalize(text)} " in given for text in check.reject):
        return False
    return any(w == given if check.mode == "equals" else w in given for w in wanted)


# A sign counts only when no letter or digit stands before it ("5-3" holds 5 and 3, "x=-3" holds
# -3); digits inside a word or a version ("H2O", "v1.2") are no numbers.
_NUMBER = re.compile(
    r"(?<![0-9]\.)(?<![^\W_])[-+]?"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<!\.)\.[0-9]+)"
    r"(?:[eE][-+]?[0-9]{1,4}(?![0-9]))?"
)


def _numeric(check: NumericCheck, answer: str) -> bool:
    number = None
    for match in _NUMBER.finditer(answer.replace("\u2212", "-")):
        number = match
        if check.take == "first":
            break
    if number is None:
        return False
    # Decimals, because floats make 0.1 + 0.2 unequal to 0.3 and need a slack that hides errors.
    given, value = Decimal(number.group().replace(",", "")), Decimal(repr(check.value))
    return abs(given - value) <= Decimal(repr(check.tolerance))


def _find(pattern: str, text: str, ignore_case: bool, mode: str) -> bool:
    compiled = regex.compile(pattern, regex.IGNORECASE if ignore_case else 0)
    find = compiled.fullmatch if mode == "fullmatch" else compiled.search
    return find(text, timeout=REGEX_SECONDS) is not None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_JSON = json.JSONDecoder(parse_constant=_no_constant)
_FENCE = re.compile(r"\s*```[A-Za-z]*\s*\n(.*)\n\s*```\s*", re.DOTALL)


def _json_values(answer: str, strict: bool) -> Iterator[Any]:
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


_PYTHON_TYPES: dict[str, Any] = {"object": dict, "array": list, "string": str, "integer": int}
_PYTHON_TYPES["number"] = (int, float)


def _is(value: Any, name: TypeName) -> bool:
    if name == "null" or isinstance(value, bool):
        return (value is None) if name == "null" else name == "boolean"
    if name == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _PYTHON_TYPES.get(name, ()))


def _same(left: Any, right: Any) -> bool:
    """Equality of JSON values: 1 equals 1.0 but not true."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_same, left, right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same(left[k], right[k]) for k in left)
    return bool(left == right)


def _fits(value: Any, shape: Shape) -> bool:
    if shape.type and not any(_is(value, name) for name in shape.type):
        return False
    if shape.enum and not any(_same(value, allowed) for allowed in shape.enum):
        return False
    if isinstance(value, dict):
        known = shape.properties
        return (
            all(name in value for name in shape.required)
            and (shape.additional_properties or value.keys() <= known.keys())
            and all(_fits(value[name], known[name]) for name in known if name in value)
        )
    if isinstance(value, list):
        sized = shape.min_items <= len(value) <= _or(shape.max_items, math.inf)
        return sized and all(_fits(item, shape.items) for item in value if shape.items)
    if isinstance(value, str):
        return shape.pattern is None or _find(shape.pattern, value, False, "search")
    if _is(value, "number"):
        return _or(shape.minimum, -math.inf) <= value <= _or(shape.maximum, math.inf)
    return True


def _or(bound: float | None, otherwise: float) -> float:
    return otherwise if bound is None else bound


# --- reading ----------------------------------------------------------------------------------


class _Problems(list[str]):
    """What is wrong with one file, gathered so that all of it is told at once."""

    def add(self, where: str, field: str, value: Any, allowed: str) -> None:
        found = "" if value is _NOTHING else f"found {_shown(value)}; "
        self.append(f"{where}: {field}: {found}{allowed}")

    def refuse(self, source: object) -> None:
        shown = self[:MAX_PROBLEMS_SHOWN]
        if len(self) > len(shown):
            shown.append(f"and {len(self) - len(shown)} more")
        if self:
            count = f"{len(self)} problem{'s' if len(self) > 1 else ''}"
            raise UserError(problem_list(f"{source}: {count}", shown))


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def load_questions(source: str | Path | None = None, quick: bool = False) -> list[Question]:
    """Read questions: the shipped `data/questions.jsonl`, or the user's own file or directory.

    Input: a path or file: URI (None for the shipped set); `quick` for the marked subset only.
    Output: the rows in file order. Errors: UserError naming every faulty row and field.
    """
    return _load(Question, source, "questions.jsonl", quick)


def load_heldout(source: str | Path | None = None, quick: bool = False) -> list[HeldoutText]:
    """Read held-out documents (`data/heldout.jsonl`); otherwise like `load_questions`."""
    return _load(HeldoutText, source, "heldout.jsonl", quick)


def load_calibration(source: str | Path | None = None) -> list[CalibrationText]:
    """Read calibration texts (`data/calibration.jsonl`); otherwise like `load_questions`."""
    return _load(CalibrationText, source, "calibration.jsonl", False)


def load_needles(source: str | Path | None = None, quick: bool = False) -> list[Needle]:
    """Read long-context recipes (`data/needle.jsonl`); otherwise like `load_questions`."""
    return _load(Needle, source, "needle.jsonl", quick)


def _load(model: type[Line], source: str | Path | None, shipped: str, quick: bool) -> list[Line]:
    path = _local_path(DATA_DIR / shipped if source is None else source)
    problems = _Problems()
    rows: list[Line] = []
    seen: dict[str, str] = {}
    for where, raw in _raw_rows(path, problems):
        try:
            row = model.model_validate(_completed(raw, where, model))
        except ValidationError as error:
            for fault in error.errors(include_url=False, include_context=False):
                _explain(model, where, fault, problems)
            continue
        if row.id in seen:
            problems.add(where, "id", row.id, f"should be unique, but {seen[row.id]} has it too")
        seen.setdefault(row.id, where)
        rows.append(row)
    if not rows and not problems:
        problems.add("whole file", "rows", _NOTHING, "there should be at least one")
    problems.refuse(path)
    return quick_subset(rows) if quick else rows


def quick_subset(rows: Sequence[Line], size: int = 40) -> list[Line]:
    """Give the rows marked `quick`; in a set without marks, about `size` evenly spread rows."""
    marked = [row for row in rows if getattr(row, "quick", False)]
    return marked or list(rows[:: max(1, math.ceil(len(rows) / size))])


def _local_path(source: str | Path) -> Path:
    text = str(source)
    if text.startswith("file:"):
        return Path(url2pathname(urlparse(text).path))
    if re.match(r"[a-z][a-z0-9+.-]+:/", text):
        raise UserError(f"{text}: not a local file; fetch it first, then give the path of the copy")
    return Path(text).expanduser()


def _raw_rows(path: Path, problems: _Problems) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give (where, row) for each readable row of any format; note what cannot be read."""
    suffix = path.suffix.lower()
    if path.is_dir() and any((path / n).exists() for n in ("state.json", "dataset_dict.json")):
        yield from _nested(_saved_rows(path), problems)
    elif path.is_file() and suffix in (".jsonl", ".ndjson"):
        yield from _nested(_jsonl_rows(path, problems), problems)
    elif path.is_file() and suffix == ".csv":
        yield from _nested(_csv_rows(path, problems), problems)
    elif path.is_file() and suffix in (".parquet", ".pq"):
        yield from _nested(_parquet_rows(path), problems)
    else:
        what = "no such file" if not path.exists() else "not a dataset"
        raise UserError(
            f"{path}: {what}; allowed are .jsonl, .csv, .parquet and a directory that "
            "datasets' save_to_disk wrote"
        )


def _jsonl_rows(path: Path, problems: _Problems) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        where = f"line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(
                line.decode("utf-8-sig" if number == 1 else "utf-8"),
                object_pairs_hook=_once,
                parse_constant=_no_constant,
            )
        except (ValueError, RecursionError) as error:
            problems.add(where, "JSON", line.decode("utf-8", "replace"), f"cannot be read: {error}")
            continue
        yield where, row


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("an object names the same key twice")
    return row


def _csv_rows(path: Path, problems: _Problems) -> Iterator[tuple[str, Any]]:
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        problems.add(f"line {line}", "encoding", raw[error.start : error.end], "should be UTF-8")
        return
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        names = reader.fieldnames or []
        if len(set(names)) < len(names):
            problems.add("line 1", "columns", names, "should be different from each other")
            return
        for row in reader:
            cells = [*(row.get(None) or []), *(row[name] or "" for name in names)]
            where = f"line {reader.line_num - sum(cell.count(chr(10)) for cell in cells)}"
            if None in row:
                problems.add(where, "columns", row[None], "more cells than the header has columns")
            else:  # an empty cell is a value that is not given
                yield where, {name: cell for name, cell in row.items() if cell}
    except csv.Error as error:
        problems.add(f"line {reader.line_num}", "CSV", _NOTHING, f"cannot be read: {error}")


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file: {error}") from None
    for number, row in enumerate(table.to_pylist(), start=1):
        yield f"row {number}", _without_nulls(row)


def _saved_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import datasets

    if (path / "dataset_dict.json").exists():
        splits = sorted(p.parent.name for p in path.glob("*/state.json"))
        raise UserError(f"{path}: holds several splits; give one: {', '.join(splits) or 'none'}")
    try:
        saved = datasets.load_from_disk(str(path))
        rows = saved.to_list()
    except Exception as error:  # the library raises whatever the broken file provokes
        raise UserError(f"{path}: not a readable saved dataset: {error}") from None
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", _without_nulls(row)


def _without_nulls(value: Any) -> Any:
    """Drop the nulls a column format fills in where a row has no such key."""
    if isinstance(value, dict):
        return {name: _without_nulls(v) for name, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _nested(rows: Iterable[tuple[str, Any]], problems: _Problems) -> Iterator[tuple[str, Any]]:
    for where, row in rows:
        if not isinstance(row, dict):
            problems.add(where, "row", row, "should be an object with named fields")
            continue
        readable = True
        for name in ("messages", "check"):
            if isinstance(row.get(name), str):
                try:
                    row[name] = json.loads(row[name], parse_constant=_no_constant)
                except (ValueError, RecursionError) as error:
                    problems.add(where, name, row[name], f"should be JSON: {error}")
                    readable = False
        if readable:
            yield where, row


def _completed(row: dict[str, Any], where: str, model: type[BaseModel]) -> dict[str, Any]:
    """Write a `prompt`/`answer` row out in full; leave every other row as it is."""
    if model is not Question or not {"prompt", "answer"} <= row.keys() or "messages" in row:
        return row
    full = {"id": where.replace(" ", "-"), "category": "custom", **row}
    full["messages"] = [{"role": "user", "content": full.pop("prompt")}]
    full["check"] = {"kind": "exact", "value": full.pop("answer")}
    return full


def _explain(model: type[BaseModel], where: str, fault: Any, problems: _Problems) -> None:
    loc, allowed, value = fault["loc"], fault["msg"].removeprefix("Value error, "), fault["input"]
    if fault["type"] == "missing":
        value, allowed = _NOTHING, "is missing"
    elif fault["type"] == "extra_forbidden":
        value, allowed = _NOTHING, f"unknown; allowed are {', '.join(_keys_at(model, loc[:-1]))}"
    problems.add(where, ".".join(map(str, loc)) or "row", value, allowed)


def _keys_at(model: type[BaseModel], loc: tuple[Any, ...]) -> list[str]:
    known: dict[Any, type[BaseModel]] = {"messages": Message, "schema": Shape}
    known |= {"exact": ExactCheck, "regex": RegexCheck, "numeric": NumericCheck, "json": JsonCheck}
    inner = next((known[part] for part in reversed(loc) if part in known), model)
    return [field.alias or name for name, field in inner.model_fields.items()]


def digest(rows: Sequence[BaseModel]) -> str:
    """Fingerprint a dataset: two runs are comparable when they saw the same digest.

    Input: validated rows. Output: sha256 in hex over one canonical JSON line a row. The order of
    keys, spaces and defaults written out or left out do not count; the order of the rows does
    (batches, and so the last digits of a metric, depend on it). Errors: none.
    """
    sha = hashlib.sha256()
    for row in rows:
        plain = row.model_dump(mode="json", by_alias=True)
        line = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        sha.update(line.encode() + b"\n")
    return sha.hexdigest()


# --- long prompts -----------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _shipped_haystack() -> tuple[str, ...]:
    plain = [row.text for row in load_calibration() if row.text is not None]
    return (*(row.text for row in load_heldout()), *plain)


def build_needle_prompt(
    row: Needle,
    tokenizer_len_fn: Callable[[str], int],
    haystack: Sequence[str] | None = None,
) -> list[dict[str, str]]:
    """Assemble the long prompt of one recipe; the same inputs always give the same prompt.

    Input: the recipe; a function that counts the tokens of a text; documents to hide the needle
    in (default: the shipped held-out and calibration texts, starting at a place drawn from the
    row's id). Output: one user message whose content measures at most `target_tokens` and hardly
    less, the needle standing as a paragraph of its own nearest to `depth`. The chat template's
    own tokens come on top. Errors: UserError when the haystack is too short for the target, or the
    target for the question.
    """
    documents = list(_shipped_haystack() if haystack is None else haystack)
    start = int(hashlib.sha256(row.id.encode()).hexdigest()[:8], 16) % max(1, len(documents))
    head = "Read the following notes. A question about one of them comes at the end."
    tail = f"Question: {row.question}"
    budget = row.target_tokens - tokenizer_len_fn("\n\n".join([head, row.needle, tail]))
    if budget <= 0:
        raise UserError(f"needle {row.id}: target_tokens {row.target_tokens} leaves no room")
    body: list[str] = []
    sizes: list[int] = []
    for document in documents[start:] + documents[:start]:
        for paragraph in filter(str.strip, document.split("\n\n")):
            if sum(sizes) < budget:
                body.append(paragraph)
                sizes.append(tokenizer_len_fn(paragraph + "\n\n"))
    if sum(sizes) < budget:
        raise UserError(
            f"needle {row.id}: the haystack holds {sum(sizes)} tokens, "
            f"but target_tokens {row.target_tokens} needs {budget}"
        )

    def prompt() -> str:
        depth, place, passed = row.depth * sum(sizes), 0, 0
        while place < len(sizes) and passed + sizes[place] / 2 < depth:
            passed += sizes[place]
            place += 1
        return "\n\n".join([head, *body[:place], row.needle, *body[place:], tail])

    while body and (over := tokenizer_len_fn(prompt()) - row.target_tokens) > 0:
        words = body[-1].split(" ")
        body[-1] = " ".join(words[: -max(1, over // 2)])
        sizes[-1] = tokenizer_len_fn(body[-1])
        if not body[-1].strip():
            del body[-1], sizes[-1]
    return [{"role": "user", "content": prompt()}]
