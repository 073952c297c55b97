"""Rows that the model is measured with: every equal and nearly equal one is found, and soon."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3_mlflow.evaluation.datasets import load_calibration, load_heldout, load_questions
from phi3_mlflow.training import overlap
from phi3_mlflow.training.conversations import Conversation, Message
from phi3_mlflow.training.overlap import THRESHOLD, Overlap, Text, find_overlaps, texts_of

SENTENCE = (
    "My parcel was due on Monday and has not arrived yet. The tracking page has said the same "
    "thing for four days. Could somebody find out where it is?"
)


def row(asked: str, answer: str = "Yes.", where: str = "line 1") -> Conversation:
    return Conversation.of([Message("user", asked), Message("assistant", answer)], where)


def similarity(one: str, other: str) -> float:
    found = find_overlaps([row(one)], [Text("other", other)], 0.001)
    return found[0].similarity if found else 0.0


@pytest.mark.parametrize(
    ("other", "low", "high"),
    [
        (SENTENCE.replace("find", "fund"), 0.92, 0.96),
        (SENTENCE.replace("four days", "four day"), 0.92, 0.96),
        (SENTENCE.replace("?", "!"), 0.98, 0.99),
        (SENTENCE.replace("Monday", "Thursday"), 0.88, 0.9),
        (SENTENCE.replace("parcel", "order"), 0.88, 0.9),
        ("Hello. " + SENTENCE, 0.945, 0.955),
        (SENTENCE.replace("parcel", "order").replace("four days", "a week"), 0.74, 0.76),
        (SENTENCE[:-43], 0.68, 0.7),
        ("I still wait for a delivery that should have come at the start of the week, and the "
         "carrier's website shows nothing new. Where can it be?", 0.04, 0.05),
        ("The lamp flickers when it is cold. Is there a part that I could exchange myself, or do I "
         "have to send all of it to you?", 0.02, 0.03),
    ],
)  # fmt: skip
def test_how_similar_changed_texts_are(other: str, low: float, high: float) -> None:
    assert low <= similarity(SENTENCE, other) <= high
    assert similarity(SENTENCE, other) == pytest.approx(similarity(other, SENTENCE))


@pytest.mark.parametrize(
    "other",
    [SENTENCE.upper(), SENTENCE.replace(" ", "\n\t "), f"  {SENTENCE}\n", SENTENCE],
)
def test_case_and_white_space_do_not_count(other: str) -> None:
    assert find_overlaps([row(SENTENCE)], [Text("question 1", other)]) == [
        Overlap("line 1", "question 1", 1.0, True)
    ]


def test_other_signs_for_the_same_letters_do_not_count() -> None:
    assert find_overlaps([row("ﬁnd the Straße")], [Text("t", "FIND THE STRASSE")])[0].exact


def test_short_texts() -> None:
    texts = [Text("a", "2+2"), Text("b", "2+3"), Text("c", ""), Text("d", "  \n")]
    assert [found.name for found in find_overlaps([row("2+2")], texts)] == ["a"]
    assert not find_overlaps([row("2")], texts)


def test_equal_sets_of_shingles_in_another_order_are_not_called_equal() -> None:
    (found,) = find_overlaps([row("aaaaaaaa")], [Text("t", "aaaaaaaaaaaa")])
    assert (found.similarity, found.exact) == (1.0, False)


def test_messages_for_themselves_and_together() -> None:
    several = Conversation.of(
        [
            Message("system", "You sort messages by who should answer them, and say nothing else."),
            Message("user", "Where is my parcel?"),
            Message("assistant", "Which one?"),
            Message("user", "The one of last week, in a blue box."),
            Message("assistant", "It is on its way, and it will be with you by tomorrow at noon."),
        ],
        "line 5",
    )
    texts = [
        Text("first", "Where is my parcel?"),
        Text("second", "The one of last week, in a blue box!"),
        Text("both", "Where is my parcel? The one of last week, in a blue box."),
        Text("answer", "It is on its way, and it will be with you by tomorrow at noon."),
        Text("system", "You sort messages by who should answer them, and say nothing else."),
        Text("short answer", "Which one?"),
    ]
    found = find_overlaps([several], texts)
    assert [o.name for o in found] == ["first", "both", "answer", "second"]
    assert texts_of([several]) == [
        Text("validation line 5", "Where is my parcel?\nThe one of last week, in a blue box.")
    ]


def test_what_is_told() -> None:
    texts = [Text("question 7", SENTENCE), Text("question 8", SENTENCE.replace("?", "!"))]
    told = [str(found) for found in find_overlaps([row(SENTENCE, where="line 12")], texts)]
    assert told[0] == "line 12 equals question 7"
    assert told[1].startswith("line 12 nearly equals question 8: similarity 0.9")


def test_a_similarity_of_just_the_threshold() -> None:
    """0.1 times 30 is more than 3 in binary: three of thirty shingles in common are enough."""
    long = "".join(chr(0x4E00 + i) for i in range(34))
    assert len(overlap._shingles(long)) == 30
    assert find_overlaps([row(long[10:17])], [Text("t", long)], 0.1)


WORDS = st.lists(st.sampled_from(["one", "two", "three", "four", "five"]), max_size=12)


@given(st.lists(WORDS, max_size=8), st.lists(WORDS, max_size=8), st.floats(0.05, 1))
def test_the_index_finds_what_comparing_all_finds(left, right, threshold) -> None:
    rows = [row(" ".join(words), where=f"line {i}") for i, words in enumerate(left)]
    texts = [Text(f"text {i}", " ".join(words)) for i, words in enumerate(right)]
    found = {(o.where, o.name): o.similarity for o in find_overlaps(rows, texts, threshold)}
    expected = {}
    for one in rows:
        for text in texts:
            a = overlap._shingles(one.messages[0].content)
            b = overlap._shingles(text.text)
            share = len(a & b) / len(a | b)
            if share >= threshold and text.text:
                expected[(one.where, text.name)] = share
    assert found == expected


def letters(count: int, seed: int) -> list[str]:
    """Sentences of random words out of a small vocabulary, so that many shingles are common."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghijklmnopqrst", k=6)) for _ in range(300)]
    return [" ".join(draw.choices(words, k=20)) for _ in range(count)]


def test_thousands_of_rows_compare_few_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice as many rows are twice as many comparisons; all with all would be five millions."""
    said = letters(5000, 1)
    texts = [Text(f"text {i}", text) for i, text in enumerate(said[:1000])]
    rows = [row(text, where=f"line {i}") for i, text in enumerate(said)]
    compared = 0

    class Counted(set):
        def __and__(self, other):
            nonlocal compared
            compared += 1
            return set.__and__(self, other)

    shingles = overlap._shingles
    monkeypatch.setattr(overlap, "_shingles", lambda text: Counted(shingles(text)))
    found = find_overlaps(rows[:2500], texts)
    half, compared = compared, 0
    both = find_overlaps(rows, texts)
    assert [(o.where, o.name, o.exact) for o in both] == [
        (f"line {i}", f"text {i}", True) for i in range(1000)
    ]
    assert found == both
    assert 1000 <= compared < 2.2 * half
    assert compared < 150_000


def test_the_sets_of_the_project_are_apart() -> None:
    """Calibration texts, as training rows, have nothing of the questions and held-out texts."""
    rows = [
        Conversation.of(
            [Message(m.role, m.content) for m in text.messages or []]
            or [Message("user", text.text or "")],
            text.id,
        )
        for text in load_calibration()
    ]
    texts = [
        *(Text(q.id, "\n".join(m.content for m in q.messages)) for q in load_questions()),
        *(Text(text.id, text.text) for text in load_heldout()),
    ]
    assert find_overlaps(rows, texts, 0.5) == []
    assert THRESHOLD > 0.5
