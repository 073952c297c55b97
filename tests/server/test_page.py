"""The chat page in a real browser."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from phi3_mlflow.server.app import PAGE, content_policy
from tests.server.browser import CHROMIUM, Page, browser
from tests.server.conftest import Gate, scripted, wait_for

KEY = "a-key-of-enough-characters"
SAID = "document.querySelector('article.assistant:last-of-type p')?.textContent"

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here")


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browser() as made:
        yield made


def _open(page: Page, url: str) -> None:
    page.events.clear()
    page.call("Page.navigate", url=url)
    page.wait(f"document.readyState === 'complete' && location.href.startsWith({json.dumps(url)})")


def _ask(page: Page, text: str) -> None:
    page.look(f"document.getElementById('text').value = {json.dumps(text)}")
    page.look("document.getElementById('send').click()")


def test_the_page_is_one_file_without_anything_from_elsewhere() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert not re.search(r"https?://|\bsrc=|@import|url\(", text)
    assert not re.search(r"innerHTML|\beval\b|\bstyle=|\bon\w+=", text), "what the policy forbids"
    policy = content_policy(text)
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


@needs_browser
@pytest.mark.slow
def test_a_conversation_streams_and_shows_version_and_rate(page: Page, gate: Gate) -> None:
    with scripted("<b>Good</b> day.", gate) as up:
        _open(page, up.url + "/")
        page.wait("document.getElementById('name').textContent === 'm'")
        assert page.look("document.getElementById('version').textContent") == "version 1"
        _ask(page, "Hello <script>alert(1)</script>")
        gate.let(5)
        wait_for(lambda: gate.work == 5)
        assert "<b>Good</b> day.".startswith(page.wait(SAID)), "pieces show as they come"
        assert page.look("!document.getElementById('stop').hidden")
        gate.open()
        note = page.wait("document.querySelector('article small')?.textContent")
        assert page.look(SAID) == "<b>Good</b> day.", "text, not markup"
        assert re.match(r"version 1 · 17 tokens · [\d.]+ tokens/s · first after [\d.]+ s", note)
        _ask(page, "Again")
        page.wait("document.querySelectorAll('article small').length === 2")
        assert page.look("messages.length") == 4
        assert page.complaints() == []
        assert all(url.startswith((up.url, "data:")) for url in page.requested())


@needs_browser
@pytest.mark.slow
def test_stop_ends_the_generation(page: Page, gate: Gate) -> None:
    with scripted("", gate) as up:
        _open(page, up.url + "/")
        page.wait("document.getElementById('name').textContent === 'm'")
        _ask(page, "Hello")
        gate.let(6)
        page.wait(SAID)
        page.look("document.getElementById('stop').click()")
        page.wait("document.getElementById('figures').textContent === 'stopped'")
        wait_for(lambda: all(one._left.is_set() for one in up.context.queue.open))
        gate.open()
        wait_for(lambda: up.context.queue.admission.running == 0)
        assert gate.work < 20


@needs_browser
@pytest.mark.slow
def test_errors_and_the_key_are_asked_for(page: Page) -> None:
    with scripted("Fine.", api_key=KEY) as up:
        _open(page, up.url + "/")
        page.wait("!document.getElementById('keyed').hidden")
        page.look(f"document.getElementById('key').value = {json.dumps(KEY)}")
        page.look("document.getElementById('key').dispatchEvent(new Event('change'))")
        page.wait("document.getElementById('name').textContent === 'm'")
        _ask(page, "x" * 300)
        wrong = page.wait("document.querySelector('article.wrong p')?.textContent")
        assert "context" in wrong
        _ask(page, "short")
        page.wait("document.querySelector('article small') !== null")
        assert page.look(SAID) == "Fine."


@needs_browser
@pytest.mark.slow
def test_the_policy_stops_foreign_script(page: Page) -> None:
    with scripted("Fine.") as up:
        _open(page, up.url + "/")
        page.look(
            "(() => { const s = document.createElement('script'); s.textContent = 'window.hit = 1';"
            " document.body.append(s); })()"
        )
        assert page.look("window.hit === undefined")
        assert any("Content Security Policy" in text for text in page.complaints())
