"""The chat template of a model, rendered as transformers does.

The two flavors render with the same code, so that both make the same text of a conversation.
"""

from __future__ import annotations

import json
import threading
from datetime import datetime
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols

from .budget import Budget, TooMuch, budgeted
from .sandbox import BoundedEnvironment, check_time_format

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from jinja2.parser import Parser

MOST_CHARACTERS = 128_000
"""Of a template; the longest in use have some twenty thousand."""
_SECONDS = 2.0
_NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_MOST_INDENT = 16


class TemplateFault(Exception):
    """A conversation that the chat template does not render, and why."""


class _Generation(Extension):
    """Marks what the assistant said, for training; here the marks mean nothing."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class ChatTemplate:
    """A template and the names of the special tokens that it may write.

    Args:
        source: jinja2's language.
        tokens: `bos_token` and the like.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        self.source = source
        self._tokens = dict(tokens)
        self._compiled: Any = None
        self._guard = threading.Lock()

    @classmethod
    def read(cls, folder: Path) -> ChatTemplate | None:
        """The template of a folder with a tokenizer, in the order in which transformers looks."""
        file = folder / "tokenizer_config.json"
        config = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        source = _template(folder, config)
        return None if source is None else cls(source, named_tokens(config))

    def render(self, messages: list[dict[str, str]], *, ask: bool = True) -> str:
        """The text of a conversation.

        Args:
            messages: with `role` and `content`.
            ask: with what begins the assistant's answer.

        Raises:
            TemplateFault: the template refuses them, or takes too much time or memory.
        """
        size = sum(len(text) for message in messages for text in message.values())
        largest = 1_000_000 + 8 * size
        budget = Budget(_SECONDS, largest, 4_000_000 + 16 * size + 200 * len(messages))
        try:
            with budgeted(budget):
                return str(
                    self._ready().render(
                        messages=[dict(message) for message in messages],
                        tools=None,
                        documents=None,
                        add_generation_prompt=ask,
                        **self._tokens,
                    )
                )
        except Exception as error:  # a template can raise anything
            why = " ".join(str(error).split())[:300] or type(error).__name__
            raise TemplateFault(why) from error

    def _ready(self) -> Any:
        with self._guard:
            if self._compiled is None:
                if len(self.source) > MOST_CHARACTERS:
                    raise TooMuch(
                        f"it has {len(self.source)} characters, at most {MOST_CHARACTERS} are taken"
                    )
                self._compiled = _environment().bounded(self.source)
            return self._compiled


def named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that a tokenizer_config.json names, which templates know as variables."""
    named = {}
    for name in _NAMED_TOKENS:
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            named[name] = token
    return named


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text("utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):
        found = {one["name"]: one["template"] for one in found}
    if isinstance(found, dict):
        found = found.get("default")
    return found if isinstance(found, str) and found else None


def _environment() -> BoundedEnvironment:
    environment = BoundedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.add_filter("tojson", _tojson)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON that is not escaped for HTML, as transformers writes it."""
    if isinstance(indent, str) or (indent or 0) > _MOST_INDENT:
        raise TooMuch(f"it indents JSON by {indent!r:.20}")
    if separators and sum(map(len, separators)) > _MOST_INDENT:
        raise TooMuch("it separates JSON by too much")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(form: str) -> str:
    check_time_format(form)
    return datetime.now().strftime(form)
