"""The chat page: its files, its policy, and what it does in a real browser."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator

import pytest

from phi3_mlflow.server.page import ASSETS, PAGE, POLICY
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


OWN = [PAGE, *(file for file in ASSETS.values() if file.parent.name != "vendor")]
VENDOR = PAGE.parent / "vendor"


def test_the_page_loads_its_own_files_and_nothing_else() -> None:
    text = PAGE.read_text(encoding="utf-8")
    loaded = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert {f"/{name}" for name in loaded if name != "data:,"} == set(ASSETS)
    assert not re.search(r"<style|<script(?![^>]*\bsrc=)|\bstyle=|\bon\w+=", text), "inline"
    for file in OWN:
        assert not re.search(r"https?://|@import|url\(", file.read_text(encoding="utf-8")), (
            file.name
        )


def test_no_html_is_made_of_a_text_but_by_the_sanitizer() -> None:
    script = ASSETS["/static/chat.js"].read_text(encoding="utf-8")
    ways_in = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|"
    ways_in += r"DOMParser|srcdoc|\beval\b|new Function|setAttribute"
    assert not re.search(ways_in, script)
    assert script.count("marked.parse(") == script.count("DOMPurify.sanitize(html, ALLOWED)") == 1


def test_the_policy_is_strict() -> None:
    assert "default-src 'none'" in POLICY
    assert "unsafe" not in POLICY
    assert "http" not in POLICY
    assert "*" not in POLICY


def test_the_libraries_are_those_that_were_published() -> None:
    told = (VENDOR / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"\| `([\w.]+\.js)` \|.*`([0-9a-f]{64})` \|", told))
    assert {VENDOR / name for name in rows} == set(VENDOR.glob("*.js"))
    for name, sha256 in rows.items():
        assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == sha256
    licences = re.findall(r"`(LICENSE-\w+)`", told)
    assert {VENDOR / name for name in licences} == set(VENDOR.glob("LICENSE*"))
    for version in re.findall(r"\) (\d+\.\d+\.\d+),", told):
        assert any(version in file.read_text("utf-8")[:400] for file in VENDOR.glob("*.js"))


def test_the_page_and_its_files_need_no_key() -> None:
    with scripted("Fine.", api_key=KEY) as up:
        client = up.http()
        del client.headers["Authorization"]
        page = client.get("/")
        assert page.headers["content-security-policy"] == POLICY
        for path, file in ASSETS.items():
            got = client.get(path)
            assert got.status_code == 200
            assert got.content == file.read_bytes()
            assert got.headers["x-content-type-options"] == "nosniff"
            assert got.headers["content-type"].startswith(("text/javascript", "text/css"))
        assert client.get("/static/README.md").status_code == 401
        assert client.get("/static/../app.py").status_code == 401
        assert client.get("/v1/models").status_code == 401


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


SHOWN = "document.querySelector('article.assistant .said')"
MARKDOWN = "# Head\n\n- **one**\n- `two < 3`\n\n|a|b|\n|-:|-|\n|1|2|\n\n[go](https://a.b/c)"
HOSTILE = [
    "<script>window.hit=1</script>",
    "<img src=x onerror=window.hit=1>",
    "a <svg onload=window.hit=1> b",
    "[x](javascript:window.hit=1)",
    "[x](data:text/html,hit)",
    "![x](http://a.b/c.png)",
    "<a href='javascript:window.hit=1'>x</a>",
    "<form action=//a.b><input name=q></form>",
    "`<b>`<iframe srcdoc='<script>window.hit=1</script>'>",
    "<math><mtext></p><style><img src=x onerror=window.hit=1>",
]


@needs_browser
@pytest.mark.slow
def test_markdown_is_rendered(page: Page) -> None:
    with scripted(MARKDOWN) as up:
        _open(page, up.url + "/")
        page.wait("document.getElementById('name').textContent === 'm'")
        _ask(page, "Hello")
        page.wait("document.querySelector('article small') !== null")
        for selector, text in {
            "h1": "Head", "li strong": "one", "li code": "two < 3", "td": "1", "a": "go",
        }.items():  # fmt: skip
            assert page.look(f"{SHOWN}.querySelector('{selector}').textContent") == text
        aligned = f"getComputedStyle({SHOWN}.querySelector('td')).textAlign"
        assert page.look(aligned) == "right"
        link = f"{SHOWN}.querySelector('a')"
        assert page.look(f"{link}.href") == "https://a.b/c"
        assert page.look(f"{link}.rel") == "noopener noreferrer"
        assert page.complaints() == []


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("said", HOSTILE)
def test_nothing_that_an_answer_says_becomes_more_than_text(page: Page, said: str) -> None:
    with scripted(said) as up:
        _open(page, up.url + "/")
        page.wait("document.getElementById('name').textContent === 'm'")
        _ask(page, "Hello")
        page.wait("document.querySelector('article small') !== null")
        names = page.look(f"[...{SHOWN}.querySelectorAll('*')].map((e) => e.tagName).join()")
        assert set(names.split(",")) <= {"P", "CODE", "A", ""}
        links = page.look(f"[...{SHOWN}.querySelectorAll('a')].map((e) => e.href).join()")
        assert not re.search("javascript|data:", links)
        assert page.look("window.hit === undefined")
        assert all(url.startswith((up.url, "data:,")) for url in page.requested())


@needs_browser
@pytest.mark.slow
def test_settings_are_sent_and_an_answer_can_be_had_again(page: Page) -> None:
    with scripted("Fine.") as up:
        _open(page, up.url + "/")
        page.wait("document.getElementById('name').textContent === 'm'")
        page.look(
            "window.sent = []; const real = window.fetch; window.fetch = (where, how) => "
            "{ if (how.body) window.sent.push(JSON.parse(how.body)); return real(where, how); }"
        )
        _ask(page, "One")
        page.wait("document.querySelectorAll('article small').length === 1")
        page.look("document.getElementById('system').value = 'Be brief.'")
        page.look("document.getElementById('temperature').value = '0.5'")
        _ask(page, "Two")
        page.wait("document.querySelectorAll('article small').length === 2")
        page.look("document.querySelector('button.retry').click()")
        page.wait("sent.length === 3 && document.querySelectorAll('article small').length === 2")
        first, second, again = page.look("sent")
        assert "temperature" not in first
        assert [m["role"] for m in first["messages"]] == ["user"]
        assert second["temperature"] == 0.5
        assert [m["role"] for m in second["messages"]] == ["system", "user", "assistant", "user"]
        assert again == second, "the answer that is had again is not part of the question"
        assert page.look("messages.length") == 4
        assert page.look("document.querySelectorAll('article').length") == 4


@needs_browser
@pytest.mark.slow
def test_it_waits_until_text_comes(page: Page, gate: Gate) -> None:
    with scripted("Good day.", gate) as up:
        _open(page, up.url + "/")
        page.wait("document.getElementById('name').textContent === 'm'")
        _ask(page, "Hello")
        page.wait("document.getElementById('figures').textContent.startsWith('waiting')")
        gate.let(5)
        page.wait(SAID)
        assert page.look("document.getElementById('figures').textContent") == ""
        page.look("document.getElementById('stop').click()")
        page.wait("document.querySelector('button.retry') !== null")
        gate.open()
        page.look("document.querySelector('button.retry').click()")
        page.wait("document.querySelector('article small')?.textContent.includes('tokens')")
        assert page.look(SAID) == "Good day."
        assert page.look("messages.length") == 2
