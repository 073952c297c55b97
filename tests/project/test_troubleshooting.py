"""docs/troubleshooting.md quotes messages; each of them has to be one that the code can print."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
VARIES = "…"
QUOTED = re.findall(r"(?m)^### `(.+)`$", PAGE.read_text(encoding="utf-8"))
THEIRS = re.findall(r'(?m)^### MLflow: "(.+)"$', PAGE.read_text(encoding="utf-8"))


def templates(source: str) -> Iterator[str]:
    """Every text that a module can print, with `VARIES` for what is filled in."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            yield "".join(
                part.value if isinstance(part, ast.Constant) else VARIES for part in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def can_print(template: str, message: str) -> bool:
    """Whether a quoted message, or its beginning, comes from a template."""
    fixed = [part.strip() for part in message.split(VARIES) if part.strip()]
    place = 0
    for part in fixed:
        place = template.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return True


@pytest.fixture(scope="module")
def printed() -> list[str]:
    files = sorted((ROOT / "phi3_mlflow").rglob("*.py"))
    return [text for file in files for text in templates(file.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("message", QUOTED)
def test_the_code_still_prints_what_is_quoted(printed: list[str], message: str) -> None:
    longest = max(message.split(VARIES), key=len)
    assert len(longest.split()) >= 2, "too little of it to be found by"
    assert any(can_print(template, message) for template in printed), message


@pytest.mark.parametrize("message", THEIRS)
def test_so_does_mlflow(message: str) -> None:
    spec = importlib.util.find_spec("mlflow.utils.conda")
    assert spec is not None
    assert spec.origin is not None
    assert message in Path(spec.origin).read_text(encoding="utf-8")


def test_there_is_something_to_check() -> None:
    assert len(QUOTED) > 20
    assert THEIRS


def test_a_message_that_was_changed_would_be_found() -> None:
    source = 'raise E(f"{x}: there is no file {y}\\n" "Give another.")'
    template = next(text for text in templates(source) if "Give" in text)
    assert template == "…: there is no file …\nGive another."
    assert can_print(template, "…: there is no file …")
    assert not can_print(template, "…: there are no files …")
    assert not can_print(template, "…: Give another. …: there is no file")
