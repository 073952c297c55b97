"""The shipped sets hold what their README says, and loaders and checks survive anything."""

from __future__ import annotations

import ast
import contextlib
import csv
import json
import operator
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from phi3_mlflow.core.errors import UserError
from phi3_mlflow.evaluation import checks, needles
from phi3_mlflow.evaluation import datasets as ds
from phi3_mlflow.evaluation.items import CalibrationText, Needle, Question
from phi3_mlflow.rows.location import without_secrets
from tests.conftest import Workspace

QUESTIONS = ds.load_questions()
HELDOUT = ds.load_heldout()
CALIBRATION = ds.load_calibration()
NEEDLES = ds.load_needles()
CHECK: TypeAdapter[Any] = TypeAdapter(checks.Check)

GOOD = {
    "id": "a",
    "category": "facts",
    "messages": [{"role": "user", "content": "What is the capital of Spain?"}],
    "check": {"kind": "exact", "value": "Madrid"},
}


def check(**fields: Any) -> Any:
    return CHECK.validate_python(fields)


def write_jsonl(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def prompt(question: Question) -> str:
    return question.messages[-1].content


def calibration_text(row: CalibrationText) -> str:
    return row.text or "\n".join(message.content for message in row.messages or ())


# --- what is shipped --------------------------------------------------------------------------


def test_shipped_sizes() -> None:
    categories = Counter(question.category for question in QUESTIONS)
    assert len(QUESTIONS) >= 220
    assert set(categories) == {
        *("facts", "arithmetic", "extraction", "transformation"),
        *("classification", "json", "multi_turn", "instruction"),
    }
    assert min(categories.values()) >= 25
    quick = ds.load_questions(quick=True)
    assert 35 <= len(quick) <= 50
    assert set(Counter(question.category for question in quick).values()) <= {5, 6, 7}
    assert {question.level for question in quick} == {"easy", "medium", "hard"}

    assert sum(len(row.text) for row in HELDOUT) / 4.5 >= 20_000
    assert len({row.register_ for row in HELDOUT}) >= 6
    assert all(1_500 <= len(row.text) <= 6_000 for row in HELDOUT)
    assert sum(len(row.text) for row in ds.load_heldout(quick=True)) / 4.5 >= 2_000
    assert len(CALIBRATION) >= 60
    assert sum(row.messages is not None for row in CALIBRATION) >= 20
    assert all(1_500 <= len(calibration_text(row)) <= 2_500 for row in CALIBRATION)
    assert {row.target_tokens for row in NEEDLES} == {1000, 2500, 4500, 7000}


def test_readme_states_what_is_there() -> None:
    readme = (ds.DATA_DIR / "README.md").read_text(encoding="utf-8")
    for category in {question.category for question in QUESTIONS}:
        rows = [question for question in QUESTIONS if question.category == category]
        levels = Counter(question.level for question in rows)
        quick = sum(question.quick for question in rows)
        cells = [category, len(rows), levels["easy"], levels["medium"], levels["hard"], quick]
        assert "| " + " | ".join(map(str, cells)) + " |" in readme
    for register in {row.register_ for row in HELDOUT}:
        texts = [row.text for row in HELDOUT if row.register_ == register]
        assert f"| {register} | {len(texts)} | {sum(map(len, texts)):,} |" in readme
    for name, rows in (("questions", QUESTIONS), ("heldout", HELDOUT), ("needle", NEEDLES)):
        quick = sum(row.quick for row in rows)
        assert re.search(rf"\| `{name}\.jsonl` \| .+ \| {len(rows)} \| {quick} \|", readme), name
    total = sum(len(calibration_text(row)) for row in CALIBRATION)
    assert f"{len(CALIBRATION)} texts, {total:,} characters" in readme


def test_shipped_multi_turn_has_history_and_prompts_are_different() -> None:
    for question in QUESTIONS:
        assert question.category != "multi_turn" or len(question.messages) >= 3, question.id
    conversations = [question.messages for question in QUESTIONS]
    assert len(set(conversations)) == len(conversations)


def shingles(texts: list[str], size: int = 8) -> set[tuple[str, ...]]:
    found: set[tuple[str, ...]] = set()
    for text in texts:
        words = re.findall(r"\w+", text.lower())
        found |= {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}
    return found


def test_sets_share_no_eight_words() -> None:
    heldout = shingles([row.text for row in HELDOUT])
    calibration = shingles([calibration_text(row) for row in CALIBRATION])
    asked = shingles([" ".join(m.content for m in q.messages) for q in QUESTIONS])
    assert not heldout & calibration
    assert not (heldout | calibration) & asked


def test_shipped_code_documents_are_python() -> None:
    for row in HELDOUT:
        if row.register_ == "code":
            ast.parse(row.text)


OPERATORS: dict[type, Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def compute(text: str) -> Fraction:
    """Evaluate + - * / and "N percent of M" with exact fractions."""
    text = re.sub(r"([\d.]+) percent of ([\d.]+)", r"\1 * \2 / 100", text)

    def walk(node: ast.expr) -> Fraction:
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](walk(node.left), walk(node.right))
        assert isinstance(node, ast.Constant), ast.dump(node)
        return Fraction(str(node.value))

    return walk(ast.parse(text, mode="eval").body)


# The sums behind the arithmetic told in words, set up again from the question's text.
TOLD = {
    "marbles": 5 + 3,
    "pencils": 10 - 4,
    "baker": 12 * 9 - 5,
    "14:20": (16 * 60 + 5) - (14 * 60 + 20),
    "jacket": 60 * Fraction(3, 4),
    "perimeter": 2 * (14 + 9),
    "pump": Fraction(840, 35 + 25),
    "Nadia": sum(18 + 4 * day for day in range(5)),
    "48 cups": (48 - 6) * 5 - 48 * 3,
    "mean of four": 4 * 21 - (17 + 20 + 28),
    "rope": Fraction(540, 45),
    "painters": Fraction(3 * 8, 4),
}


def test_arithmetic_keys_are_recomputed() -> None:
    told = set()
    for question in QUESTIONS:
        if question.category != "arithmetic":
            continue
        assert isinstance(question.check, checks.NumericCheck)
        if direct := re.fullmatch(
            r"What is (.+)\? Answer with the number only\.", prompt(question)
        ):
            expected = compute(direct[1])
        else:
            (key,) = [key for key in TOLD if key in prompt(question)]
            told.add(key)
            expected = Fraction(TOLD[key])
        assert float(expected) == question.check.value, question.id
    assert told == set(TOLD)


TASKS = {
    r"Convert this (?:word|text) to uppercase: (.+)": str.upper,
    r"Convert this word to lowercase: (.+)": str.lower,
    r"Spell this word backwards: (.+?)\.": lambda text: text[::-1],
    r"Write these words in reverse order: (.+?)\.": lambda t: ", ".join(t.split(", ")[::-1]),
    r"Sort these words in alphabetical order: (.+?)\.": lambda t: ", ".join(sorted(t.split(", "))),
    r"Sort these numbers from smallest to largest: (.+?)\. ": lambda t: ", ".join(
        sorted(t.split(", "), key=float)
    ),
    r"Sort these numbers from largest to smallest: (.+?)\. ": lambda t: ", ".join(
        sorted(t.split(", "), key=float, reverse=True)
    ),
    r"Remove every vowel \(.+?\) from this word: (.+?)\.": lambda t: re.sub("[aeiou]", "", t),
    r"Write the number (45) in binary": lambda t: f"{int(t):b}",
    r"Write the third letter of each .+ as one word: (.+?)\.": lambda t: "".join(
        word[2] for word in t.split(", ")
    ),
    r"Reverse the order of the words .+ punctuation: (.+?)\.": lambda t: " ".join(
        t.lower().split()[::-1]
    ),
    r"Join these words with hyphens: (.+?)\.": lambda t: t.replace(" ", "-"),
}


def test_transformation_keys_are_recomputed() -> None:
    done = Counter()
    for question in QUESTIONS:
        for pattern, solve in TASKS.items():
            if question.category == "transformation" and (m := re.match(pattern, prompt(question))):
                done[pattern] += 1
                assert checks.check_answer(question.check, solve(m[1])), question.id
                assert not checks.check_answer(question.check, m[1]), (
                    f"{question.id}: echo is enough"
                )
    assert done.keys() == TASKS.keys()


def test_extraction_answers_stand_in_the_passage_or_are_computed() -> None:
    for question in QUESTIONS:
        if question.category == "extraction" and isinstance(question.check, checks.ExactCheck):
            passage = checks.normalize(prompt(question))
            known = {"one", "1"}  # the notice period, which has to be worked out
            wanted = {checks.normalize(v) for v in (question.check.value, *question.check.aliases)}
            assert any(f" {w} " in f" {passage} " for w in wanted) or wanted & known, question.id


@pytest.mark.parametrize("answer", ["", " ", "I do not know.", "Sorry, I cannot help with that."])
def test_no_shipped_check_passes_an_answer_that_says_nothing(answer: str) -> None:
    passed = [row.id for row in [*QUESTIONS, *NEEDLES] if checks.check_answer(row.check, answer)]
    assert passed == []


def test_repeating_the_question_is_no_answer() -> None:
    for question in QUESTIONS:
        if question.category in ("facts", "arithmetic", "json", "multi_turn"):
            text = prompt(question)
            if (question.category, text) != ("multi_turn", "ping"):
                sums = re.sub(r"What is (.+)\? Answer.*", r"\1", text)
                assert not checks.check_answer(question.check, text), question.id
                assert not checks.check_answer(question.check, sums), question.id


def test_labels_of_a_classification_exclude_each_other() -> None:
    for question in QUESTIONS:
        if "positive or negative" in prompt(question):
            assert not checks.check_answer(question.check, "positive or negative"), question.id


# --- checking answers -------------------------------------------------------------------------


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


def test_no_answer_is_wrong() -> None:
    assert not any(checks.check_answer(c, None) for c in CHECKS)


def test_catastrophic_pattern_ends() -> None:
    assert checks.check_answer(check(kind="regex", pattern=r"(a|a)*b"), "a" * 60) is False


@given(st.text(max_size=200))
def test_check_answer_is_pure_and_boolean(answer: str) -> None:
    first = [checks.check_answer(c, answer) for c in CHECKS]
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


# --- loading ----------------------------------------------------------------------------------


def test_every_fault_of_a_file_is_named_with_its_line(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "broken.jsonl",
        GOOD,
        {**GOOD, "id": "", "messages": [{"role": "bot", "content": "x"}], "max_tokens": 0},
        '{"id": "c", ',
        "",
        ["not", "an", "object"],
        {**GOOD, "id": "d", "check": {"kind": "exactly", "value": "x"}},
        {**GOOD, "id": "e", "check": {"kind": "regex", "pattern": "("}, "chek": 1},
        {**GOOD, "id": "f", "check": {"kind": "json", "schema": {"typ": "object"}}},
        GOOD,
        {"id": "g", "category": "facts", "check": GOOD["check"]},
        {**GOOD, "id": "h", "check": {"kind": "numeric", "value": "many", "tolerance": -1}},
        {**GOOD, "id": "i", "messages": [{"role": "assistant", "content": "x"}]},
        '{"id": "j", "id": "k"}',
        {**GOOD, "id": "l", "check": {"kind": "regex", "pattern": "x*"}},
    )
    with pytest.raises(UserError) as caught:
        ds.load_questions(path)
    message = str(caught.value)
    for expected in [
        r"broken\.jsonl",
        r"line 2: id: found ''; .*pattern",
        r"line 2: messages\.0\.role: found 'bot'; .*'system', 'user' or 'assistant'",
        r"line 2: max_tokens: found 0; .*greater than or equal to 1",
        r"line 3: JSON: ",
        r"line 5: row: found \['not', 'an', 'object'\]",
        r"line 6: check: .*'exact', 'regex', 'numeric', 'json'",
        r"line 7: check\.regex: .*regular expression",
        r"line 7: chek: unknown; allowed are id, category, messages",
        r"line 8: check\.json\.schema\.typ: unknown; allowed are type, properties",
        r"line 9: id: found 'a'; should be unique, but line 1 has it too",
        r"line 10: messages: is missing",
        r"line 11: check\.numeric\.value: found 'many'",
        r"line 11: check\.numeric\.tolerance: found -1",
        r"line 12: messages: .*role 'user'",
        r"line 13: JSON: .*same key twice",
        r"line 14: check\.regex: .*empty answer",
    ]:
        assert re.search(expected, message), f"{expected}\nnot in\n{message}"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("gone.jsonl", None, "no such file"),
        ("notes.txt", b"hello", "allowed are .jsonl, .csv, .parquet"),
        ("empty.jsonl", b"\n\n", "should be at least one"),
        ("empty.csv", b"", "should be at least one"),
        ("latin.jsonl", b'{"id": "\xe9"}\n', "line 1: JSON"),
        ("latin.csv", b"id,prompt,answer\n1,\xe9,x\n", "line 2: encoding"),
        ("wide.csv", b"id,prompt,answer\n1,x,y,z\n", "line 2: columns"),
        ("twice.csv", b"id,id\n1,2\n", "line 1: columns"),
        ("multi.csv", b'id,prompt,answer\n1,"a\nb",x\n1,c,y\n', "line 4: id: .*line 2 has it too"),
        (
            "cell.csv",
            b"id,category,messages,check\na,b,[,x\n",
            "line 2: messages: .*should be JSON",
        ),
        ("not.parquet", b"PAR?", "not a readable Parquet file"),
    ],
)
def test_unusable_files(tmp_path: Path, name: str, content: bytes | None, expected: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=expected):
        ds.load_questions(tmp_path / name)


def test_a_file_uri_is_read(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a b.jsonl", GOOD)
    assert ds.load_questions(path.as_uri()) == ds.load_questions(str(path))


def test_a_uri_is_downloaded_by_mlflow(workspace: Workspace) -> None:
    import mlflow

    file = write_jsonl(workspace.folder / "q.jsonl", GOOD)
    mlflow.set_tracking_uri(workspace.tracking_uri)
    with mlflow.start_run() as run:
        mlflow.log_artifact(str(file))
    rows = ds.load_questions(f"runs:/{run.info.run_id}/q.jsonl")
    assert rows == ds.load_questions(file)
    secret = "mlflow-artifacts://user:pass@127.0.0.1:9/q.jsonl?token=pass"
    with pytest.raises(UserError, match="cannot be downloaded") as refused:
        ds.load_questions(f"runs:/{'0' * 32}/q.jsonl")
    assert "Give a path, or a URI" in str(refused.value)
    assert without_secrets(secret) == "mlflow-artifacts://127.0.0.1:9/q.jsonl"


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet

    kinds = [q for q in QUESTIONS if q.category in ("facts", "json", "arithmetic")][:60]
    rows = [json.loads(q.model_dump_json(by_alias=True, exclude_defaults=True)) for q in kinds]
    flat = [
        {**r, "messages": json.dumps(r["messages"]), "check": json.dumps(r["check"])} for r in rows
    ]
    write_jsonl(tmp_path / "q.jsonl", *rows)
    with (tmp_path / "q.csv").open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, fieldnames=sorted({k for r in flat for k in r}))
        writer.writeheader()
        writer.writerows(flat)
    names = sorted({k for r in flat for k in r})
    table = pa.table({name: [r.get(name) for r in flat] for name in names})
    pa.parquet.write_table(table, tmp_path / "q.parquet")
    datasets.Dataset(table).save_to_disk(tmp_path / "q")
    for name in ("q.jsonl", "q.csv", "q.parquet", "q"):
        assert ds.load_questions(tmp_path / name) == kinds, name

    nested = [r for r in rows if r["check"]["kind"] == "numeric"]
    pa.parquet.write_table(pa.Table.from_pylist(nested), tmp_path / "nested.parquet")
    assert ds.load_questions(tmp_path / "nested.parquet") == [
        q for q in kinds if q.check.kind == "numeric"
    ]
    datasets.DatasetDict({"test": datasets.Dataset(table)}).save_to_disk(tmp_path / "dict")
    with pytest.raises(UserError, match="several splits; give one: test"):
        ds.load_questions(tmp_path / "dict")
    assert ds.load_questions(tmp_path / "dict" / "test") == kinds


def test_prompt_and_answer_are_enough(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("prompt,answer\nCapital of Spain?,Madrid\n", "utf-8")
    (row,) = ds.load_questions(tmp_path / "mine.csv")
    assert (row.id, row.category) == ("line-2", "custom")
    assert checks.check_answer(row.check, "Madrid, of course")


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*GOOD, "kind", "value", "schema", "pattern", "role", "content", "x"]),
            inner,
        )
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(st.lists(ANY_JSON.map(json.dumps) | st.text(max_size=30), min_size=1, max_size=5))
def test_any_file_is_read_or_refused(tmp_path_factory: Any, lines: list[str]) -> None:
    path = tmp_path_factory.mktemp("any") / "any.jsonl"
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    with contextlib.suppress(UserError):
        assert all(isinstance(row, Question) for row in ds.load_questions(path))


@settings(deadline=None)
@given(st.text(max_size=200))
def test_any_csv_is_read_or_refused(tmp_path_factory: Any, text: str) -> None:
    path = tmp_path_factory.mktemp("any") / "any.csv"
    path.write_bytes(("id,prompt,answer\n" + text).encode("utf-8", "surrogatepass"))
    with contextlib.suppress(UserError):
        assert all(isinstance(row, Question) for row in ds.load_questions(path))


# --- digest and long prompts ------------------------------------------------------------------


def test_digest_ignores_key_order_and_defaults_and_sees_the_rest(tmp_path: Path) -> None:
    other = {**GOOD, "id": "b"}
    plain = ds.load_questions(write_jsonl(tmp_path / "1.jsonl", GOOD, other))
    spelled = {**dict(reversed(GOOD.items())), "max_tokens": 64, "quick": False}
    same = ds.load_questions(write_jsonl(tmp_path / "2.jsonl", spelled, "", other))
    turned = ds.load_questions(write_jsonl(tmp_path / "3.jsonl", other, GOOD))
    assert ds.digest(plain) == ds.digest(same)
    assert len({ds.digest(plain), ds.digest(turned), ds.digest(plain[:1]), ds.digest([])}) == 4


def words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize("row", NEEDLES, ids=lambda row: row.id)
def test_needle_prompts(row: Needle) -> None:
    messages = needles.build_needle_prompt(row, lambda text: (len(text) + 3) // 4)
    assert messages == needles.build_needle_prompt(row, lambda text: (len(text) + 3) // 4)
    (message,) = messages
    text = message["content"]
    assert 0.97 * row.target_tokens <= (len(text) + 3) // 4 <= row.target_tokens
    assert abs(text.index(row.needle) / len(text) - row.depth) < 0.12
    assert checks.check_answer(row.check, row.needle)
    assert not checks.check_answer(
        row.check, text.replace(row.needle, "")[: checks.MAX_ANSWER_CHARS]
    )


@given(st.integers(100, 2000), st.floats(0, 1))
@settings(deadline=None, max_examples=30)
def test_needle_prompt_fits_any_target(target: int, depth: float) -> None:
    row = NEEDLES[0].model_copy(update={"target_tokens": target, "depth": depth})
    (message,) = needles.build_needle_prompt(row, words)
    assert 0.9 * target <= words(message["content"]) <= target
    assert row.needle in message["content"]


def test_needle_prompt_refuses_what_cannot_be_built() -> None:
    with pytest.raises(UserError, match="haystack holds"):
        needles.build_needle_prompt(NEEDLES[0], words, ["too short"])
    with pytest.raises(UserError, match="no room"):
        needles.build_needle_prompt(NEEDLES[0].model_copy(update={"target_tokens": 100}), len)
