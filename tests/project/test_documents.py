"""The documents: their links lead somewhere, and what has to be short is short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "data" / "README.md")
)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)|<(https?://[^>\s]+)>")


def prose(path: Path) -> str:
    """A document without what is code in it."""
    text = re.sub(r"(?ms)^```.*?^```$", "", path.read_text(encoding="utf-8"))
    return re.sub(r"`[^`\n]*`", "code", text)


def anchors(path: Path) -> set[str]:
    """The names of a document's headings, as GitHub makes them."""
    text = re.sub(r"(?ms)^```.*?^```$", "", path.read_text(encoding="utf-8"))
    found: set[str] = set()
    for heading in re.findall(r"(?m)^#{1,6} +(.+?)\s*$", text):
        name = re.sub(r"[^\w\- ]", "", heading.replace("`", "")).strip().lower().replace(" ", "-")
        number = 0
        while (f"{name}-{number}" if number else name) in found:
            number += 1
        found.add(f"{name}-{number}" if number else name)
    return found


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_leads_somewhere(name):
    document = ROOT / name
    broken = []
    for target, address in LINK.findall(prose(document)):
        if address or re.match(r"https?://", target):
            continue
        place, _, anchor = target.partition("#")
        path = (document.parent / place).resolve() if place else document
        missing = not path.exists() or not path.is_relative_to(ROOT)
        if missing or (anchor and anchor not in anchors(path)):
            broken.append(target)
    assert not broken


def test_a_broken_link_would_be_found(tmp_path):
    page = tmp_path / "a.md"
    page.write_text(
        "# One `two`: three\n\n## Same\n\n## Same\n\n```\n[x](nowhere.md)\n```\n`[y](z)`\n"
    )
    assert anchors(page) == {"one-two-three", "same", "same-1"}
    assert LINK.findall(prose(page)) == []
    page.write_text("See [`x`](docs/a.md#b) and ![p](p.png).\n")
    assert [target for target, _ in LINK.findall(prose(page))] == ["docs/a.md#b", "p.png"]


@pytest.mark.parametrize(("name", "most"), [("README.md", 10_000), ("CONTRIBUTING.md", 2_000)])
def test_what_is_read_first_is_short(name, most):
    assert (ROOT / name).stat().st_size <= most


def test_every_document_is_reachable_from_the_readme():
    waiting, seen = [ROOT / "README.md"], set()
    while waiting:
        document = waiting.pop()
        seen.add(document)
        for target, _ in LINK.findall(prose(document)):
            path = (document.parent / target.partition("#")[0]).resolve()
            if path.suffix == ".md" and path.is_file() and path not in seen:
                waiting.append(path)
    assert {str(path.relative_to(ROOT)) for path in seen} >= set(DOCUMENTS) - {"data/README.md"}


def test_every_measurement_is_shown(root):
    """Each file of benchmarks/results has its table in a document."""
    shown = set()
    for path in (root / "docs").glob("*.md"):
        shown |= set(re.findall(r"BEGIN generated: benchmark:(\S+) ", path.read_text("utf-8")))
    assert shown == {path.stem for path in (root / "benchmarks" / "results").glob("*.json")}


MANUALS = sorted((ROOT / "phi3_mlflow" / "stages").glob("*.py"))
EXAMPLE = re.compile(r"(?m)^ *(mlflow run [^\n]*(?:\\\n[^\n]*)*)")


def examples(text: str) -> list[str]:
    """The commands in a text that start `mlflow run`, each with its continued lines."""
    return EXAMPLE.findall(text)


@pytest.mark.parametrize("name", [*DOCUMENTS, *(str(m.relative_to(ROOT)) for m in MANUALS)])
def test_every_example_says_where_its_environment_comes_from(name):
    """Without `--env-manager` MLflow wants conda, and fails where there is none."""
    unsaid = [
        command
        for command in examples((ROOT / name).read_text(encoding="utf-8"))
        if "--env-manager" not in command and "--backend" not in command
    ]
    assert not unsaid


def test_a_forgotten_environment_would_be_found():
    text = "mlflow run . -e a \\\n  --env-manager uv\n    mlflow run . -P b=c\n`mlflow run .`\n"
    assert [command.split()[2:4] for command in examples(text)] == [[".", "-e"], [".", "-P"]]


SET = re.compile(r"(?ms)^```(csv|json)\n((?:prompt,answer|\{\"id\").*?)^```$")


@pytest.mark.parametrize("name", ["docs/tutorials.md", "docs/evaluation.md"])
def test_the_questions_that_are_shown_can_be_asked(name, tmp_path):
    from phi3_mlflow.evaluation.datasets import load_questions

    found = SET.findall((ROOT / name).read_text(encoding="utf-8"))
    assert {kind for kind, _ in found} == {"csv", "json"}
    for number, (kind, text) in enumerate(found):
        file = tmp_path / f"{number}.{'csv' if kind == 'csv' else 'jsonl'}"
        # A single row may be laid out over several lines, to be read.
        rows = text if kind == "csv" or text.count('"id"') > 1 else text.replace("\n", " ") + "\n"
        file.write_text(rows, encoding="utf-8")
        assert load_questions(file)
