"""The shipped sets hold what their README says, and every key of an answer is worked out again."""

from __future__ import annotations

import ast
import operator
import re
from collections import Counter
from fractions import Fraction
from typing import Any

import pytest

from phi3_mlflow.evaluation import checks
from phi3_mlflow.evaluation import datasets as ds
from phi3_mlflow.evaluation.items import CalibrationText, Question

QUESTIONS = ds.load_questions()
HELDOUT = ds.load_heldout()
CALIBRATION = ds.load_calibration()
NEEDLES = ds.load_needles()


def prompt(question: Question) -> str:
    return question.messages[-1].content


def calibration_text(row: CalibrationText) -> str:
    return row.text or "\n".join(message.content for message in row.messages or ())


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
