"""The report: complete in itself, the verdict first, and nothing that a model said is run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from phi3_mlflow.evaluation.gate import Verdict, against_champion, check_thresholds
from phi3_mlflow.evaluation.items import HeldoutText, Question
from phi3_mlflow.evaluation.measurement import Measurement
from phi3_mlflow.evaluation.report.build import known_versions, write_report
from phi3_mlflow.evaluation.result import TEXTS_TAG, Evaluation, ModelFacts
from phi3_mlflow.evaluation.sets import Sets
from phi3_mlflow.evaluation.settings import Bound, Margin
from phi3_mlflow.tracking import registry
from phi3_mlflow.tracking.registry import VersionName
from tests.conftest import own_store
from tests.evaluation.measurements import measurement

HOSTILE = '"></p></section><script>alert(1)</script><img src=x onerror=alert(2)>'
RIGHT = [number % 3 == 0 for number in range(36)]  # 24 wrong ones
BETTER = [number % 3 != 1 for number in range(36)]
FIRST, SECOND = VersionName("m", "1"), VersionName("m", "2")


def question(number: int, level: str = "medium") -> Question:
    return Question.model_validate(
        {
            "id": f"q{number}",
            "category": ("facts", "json")[number % 2],
            "level": level,
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": f"Number {number}? {HOSTILE}"},
            ],
            "check": {"kind": "exact", "value": f"wanted {number}{HOSTILE}", "aliases": ["else"]},
        }
    )


QUESTIONS = [question(number, "easy" if number == 35 else "medium") for number in range(36)]


SETS = Sets(QUESTIONS, [HeldoutText(id=f"t{i}", text="text") for i in range(9)], (), 512)
FACTS = ModelFacts(f"A model {HOSTILE}", "SmolLM2", "pypi:smollm2", "int4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where reports are written; the store knows two versions of `m`."""
    with own_store(tmp_path_factory.mktemp("report")) as place:
        client = registry.client()
        client.create_registered_model("m")
        tags = {"algorithm": "rtn", "source": f"file:{HOSTILE}"}
        for _ in range(2):
            client.create_model_version("m", source="nowhere", tags=tags)
        yield place.folder


def found(right: Sequence[bool], kl: float = 0.1) -> Measurement:
    made = measurement(right, [kl] * 9, size_bytes=1e8)
    hostile = tuple(
        replace(
            a,
            text=f"answer {a.question_id} {HOSTILE}",
            why_wrong="" if a.correct else f"it says {a.question_id} {HOSTILE}",
        )
        for a in made.answers
    )
    return replace(made, answers=hostile, sample={"question": HOSTILE, "answer": HOSTILE})


def alone(right: Sequence[bool] = RIGHT) -> Evaluation:
    mine = found(right)
    return Evaluation(FIRST, mine, check_thresholds(mine.metrics, {"kl_mean": Bound(max=1)}), None)


def beside_the_champion() -> Evaluation:
    mine, theirs = found(RIGHT, 0.3), found(BETTER, 0.1)
    verdict = check_thresholds(mine.metrics, {"accuracy": Bound(min=0.9)})
    margins = {"accuracy": Margin(by=0.05), "kl_mean": Margin(percent=10)}
    verdict = against_champion(verdict, mine, theirs, margins, FIRST.uri)
    return Evaluation(SECOND, mine, verdict, theirs)


class Page(HTMLParser):
    """A page as a browser sees it: elements with their attributes, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.text += " "

    def handle_data(self, data: str) -> None:
        self.text += data

    def classes(self, name: str) -> int:
        return sum(name in (a.get("class") or "").split() for _, a in self.elements)


def page(evaluation: Evaluation, folder: Path, **reference: str) -> Page:
    write_report(evaluation, FACTS, SETS, folder, reference)
    return Page((folder / "report.html").read_text("utf-8"))


def test_nothing_is_loaded_from_anywhere_and_nothing_runs(folder: Path) -> None:
    shown = page(beside_the_champion(), folder, q1=f"reference {HOSTILE}")
    tags = {tag for tag, _ in shown.elements}
    assert not tags & {"script", "img", "link", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in shown.elements:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "xlink:href", "action", "data"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
    assert "@import" not in shown.html
    assert re.findall(r"url\((?!#)", shown.html) == []
    outside = {a for a in re.findall(r"https?://[^\s\"'<]+", shown.html) if "www.w3.org/" not in a}
    assert outside == set(), "only the names of XML's own namespaces"


def test_what_models_and_questions_say_is_shown_as_it_is(folder: Path) -> None:
    shown = page(beside_the_champion(), folder, q1=f"reference {HOSTILE}")
    for words in (
        f"A model {HOSTILE}",
        f"Number 1? {HOSTILE}",
        f"wanted 1{HOSTILE} or else",
        f"answer q1 {HOSTILE}",
        f"It says q1 {HOSTILE}.",
        f"reference {HOSTILE}",
        f"file:{HOSTILE}",
    ):
        assert words in shown.text, words
    assert shown.elements[0] == ("html", {"lang": "en"})


def test_the_verdict_comes_first(folder: Path) -> None:
    shown = page(beside_the_champion(), folder)
    first = next(a for tag, a in shown.elements if tag == "section")
    assert (first.get("class") or "").split() == ["verdict", "refuse"]
    places = [
        shown.text.index(words)
        for words in (
            "Refused: the alias champion stays",
            "accuracy is 0.3333, 0.5667 below the min 0.9",
            "McNemar",
            "The gate",
            "Figures",
            "Quality against size and speed",
            "The 20 worst answers",
        )
    ]
    assert places == sorted(places)
    assert "Passed: it may become champion" in page(alone(), folder).text


def test_what_was_not_gated_is_not_shown_in_green(folder: Path) -> None:
    mine = found(RIGHT)
    shown = page(Evaluation(FIRST, mine, Verdict((), off=True), None), folder)
    first = next(a for tag, a in shown.elements if tag == "section")
    assert (first.get("class") or "").split() == ["verdict", "keep"]
    text = " ".join(shown.text.split())
    assert "Not gated: it may become champion, and nothing was checked" in text
    assert "gate: off in the profile" in text
    assert "Passed" not in text


def test_figures_stand_beside_the_champion_and_full_precision(folder: Path) -> None:
    shown = " ".join(page(beside_the_champion(), folder).text.split())
    assert "Compared with models:/m/1." in shown
    assert "What int4 bought, and what it cost" in shown
    assert "Not measured of full precision: size on disk" in shown
    for words in ("this version champion difference full precision", "33.3%", "66.7%", "worse"):
        assert words in shown, words
    assert re.search(r"KL divergence from full precision .*? 0.300 nats 0.100 nats", shown)
    assert (
        "champion"
        not in " ".join(page(alone(), folder).text.split())
        .partition("Figures")[2]
        .partition("Quality")[0]
    )


def test_categories_are_also_told_in_numbers(folder: Path) -> None:
    shown = " ".join(page(beside_the_champion(), folder).text.split())
    assert "facts 18 33% 16% – 56% 67% json 18 33% 16% – 56% 67%" in shown


def test_the_twenty_worst_answers_side_by_side(folder: Path) -> None:
    shown = page(beside_the_champion(), folder, q1="reference says")
    assert shown.text.count("version 2: wrong") == shown.text.count(" or else") == 20
    lost = [n for n in range(36) if BETTER[n] and not RIGHT[n]]  # 12: they come first
    order = [int(n) for n in re.findall(r"answer q(\d+) .*?\n", shown.text)]
    firsts = list(dict.fromkeys(order))
    assert set(firsts[: len(lost)]) == set(lost)
    assert firsts[0] == 35, "the easy one first"
    assert shown.text.count("champion: right") == len(lost)
    assert shown.classes("answer") == 20 + 20 + ("reference says" in shown.text)


def test_a_version_that_was_right_throughout(folder: Path) -> None:
    assert "None: every answer was right." in page(alone([True] * 36), folder).text


def test_every_plot_is_in_the_page_in_its_colours(folder: Path) -> None:
    plots = write_report(beside_the_champion(), FACTS, SETS, folder)
    assert set(plots) == {"quality", "categories", "latency", "divergence"}
    html = (folder / "report.html").read_text("utf-8")
    assert html.count("<svg") == 4
    for colour in ("#3361e0", "#d9822b"):
        assert colour not in html.partition("<svg")[2], "a colour that a dark page cannot change"
    assert "champion, version 1" in html


def test_the_same_report_again_is_the_same_bytes(folder: Path) -> None:
    one, other = (page(beside_the_champion(), folder).html for _ in range(2))
    assert one == other


def test_the_champion_that_is_the_same_model_is_not_compared(folder: Path) -> None:
    mine = found(RIGHT)
    verdict = Verdict((), against=FIRST.uri, note="it is the same model as the champion")
    shown = page(Evaluation(SECOND, mine, verdict, mine), folder)
    assert "Good enough, but the champion stays" in shown.text
    assert "champion: right" not in shown.text


def test_only_versions_of_the_same_texts_are_plotted_together(folder: Path) -> None:
    old = {"size_bytes": "1e8", "tokens_per_second": "10", "kl_mean": "0.2", TEXTS_TAG: "other"}
    registry.set_tags(SECOND, old)
    assert [known.number for known in known_versions(alone(), "these")] == ["1"]
    registry.set_tags(SECOND, {TEXTS_TAG: "these"})
    known = known_versions(alone(), "these")
    assert [(k.number, k.role, k.kl_mean) for k in known] == [
        ("1", "version", pytest.approx(0.1)),
        ("2", "other", 0.2),
    ]
    # The champion was measured just now, whatever its tags say.
    known = known_versions(beside_the_champion(), "others")
    assert [(k.role, round(k.kl_mean, 3)) for k in known] == [("champion", 0.1), ("version", 0.3)]
