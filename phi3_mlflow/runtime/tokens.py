"""Texts to tokens, with the model's own tokenizer and its own chat template, for every engine.

In the messages of a conversation the spelling of a control token (`<|end|>`) is text like any
other: only the chat template begins and ends turns, whatever a user writes. A prompt of the plain
contract is literal: there it is the token.
"""

from __future__ import annotations

import json
import re
import secrets
import threading
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from .request import RequestError
from .template import ChatTemplate, TemplateFault, named_tokens
from .vocabulary import Vocabulary

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

_OPEN, _CLOSE = "\U000f8e57", "\U000f8e58"
"""Of private use: around the number of a token in texts that are on their way, with a secret
beside it, so that no user can write it."""


class ChatTokenizer:
    """The tokenizer of a model; may be used from several threads at once.

    Args:
        folder: holds tokenizer.json, and tokenizer_config.json and chat_template.jinja if the model
            has them.
        ends: tokens that end a turn, which are control tokens whatever tokenizer.json says of them.

    Raises:
        ValueError: the tokenizer is of a kind that is not known.
    """

    def __init__(self, folder: Path, ends: Iterable[int] = ()) -> None:
        self._file = folder / "tokenizer.json"
        self._tokenizer = _loaded(Tokenizer.from_file(str(self._file)))
        self._vocabulary = Vocabulary(folder)
        self.template = ChatTemplate.read(folder)
        config = folder / "tokenizer_config.json"
        named = named_tokens(json.loads(config.read_text("utf-8"))) if config.is_file() else {}
        end = named.get("eos_token")
        self.end: int | None = None if end is None else self._tokenizer.token_to_id(end)
        added = self._tokenizer.get_added_tokens_decoder()
        control = set(named.values())
        self._control = {
            token.content: number
            for number, token in added.items()
            if token.special or number in set(ends) or token.content in control
        }
        self._spelled = _any_of(self._control)
        self._secret = secrets.token_hex(8)
        self._guard = threading.Lock()
        self._plain: Tokenizer | None = None

    def render(self, messages: list[dict[str, str]]) -> list[int]:
        """The tokens of a conversation, ready for the assistant's answer.

        Raises:
            RequestError: the chat template refuses the messages.
        """
        if self.template is None:
            raise RequestError(["messages: this model has no chat template"])
        marked = [{**one, "content": self._marked(one["content"])} for one in messages]
        try:
            text = self.template.render(marked)
        except TemplateFault as error:
            raise RequestError([f"messages: the chat template refuses them: {error}"]) from error
        # What the template wrote is complete: adding special tokens would double the first one.
        if marked == messages:
            return self._ids(self._tokenizer, text, special=False)
        return self._ids(self._without_control(), self._respelled(text), special=False)

    def encode(self, text: str) -> list[int]:
        """The tokens of a literal text, in which control tokens are taken for what they are."""
        return self._ids(self._tokenizer, text, special=True)

    def decoder(self) -> Callable[[int], str]:
        """A function that takes the tokens of one answer in turn and gives their text."""
        return self._vocabulary.decoder()

    def spell(self, token: int) -> bytes:
        """The bytes of a token's text; none for a control token."""
        return self._vocabulary.spell(token)

    @staticmethod
    def _ids(tokenizer: Tokenizer, text: str, *, special: bool) -> list[int]:
        # Unlike `encode` this lets other threads go on meanwhile.
        (encoding,) = tokenizer.encode_batch_fast([text], add_special_tokens=special)
        return list(encoding.ids)

    def _marked(self, content: str) -> str:
        """A user's text in which no control token is spelled: each is its number, in marks."""
        if self._spelled is None or not self._spelled.search(content):
            return content
        return self._spelled.sub(lambda found: self._mark("t", self._control[found[0]]), content)

    def _mark(self, kind: str, number: int) -> str:
        return f"{_OPEN}{kind}{number}.{self._secret}{_CLOSE}"

    def _respelled(self, text: str) -> str:
        """A rendered text as the tokenizer without control tokens takes it.

        The tokens that the template wrote get the spelling that they have there, and what users
        wrote its own again.
        """
        spelled = self._spelled
        assert spelled is not None
        text = spelled.sub(lambda found: self._mark("c", self._control[found[0]]), text)
        texts = {str(number): content for content, number in self._control.items()}
        marks = f"{_OPEN}t([0-9]+)[.]{self._secret}{_CLOSE}"
        return re.sub(marks, lambda found: texts[found[1]], text)

    def _without_control(self) -> Tokenizer:
        """The tokenizer with other spellings for the control tokens; made when it is needed."""
        with self._guard:
            if self._plain is None:
                about = json.loads(self._file.read_text("utf-8"))
                self._plain = _loaded(Tokenizer.from_str(json.dumps(self._renamed(about))))
            return self._plain

    def _renamed(self, about: dict[str, Any]) -> dict[str, Any]:
        new = {content: self._mark("c", number) for content, number in self._control.items()}
        for token in about["added_tokens"]:
            token["content"] = new.get(token["content"], token["content"])
        model = about["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {new.get(name, name): at for name, at in model["vocab"].items()}
        else:
            model["vocab"] = [[new.get(name, name), score] for name, score in model["vocab"]]
        if "merges" in model:  # none of them may make a control token of a user's text
            pairs = [one.split(" ") if isinstance(one, str) else one for one in model["merges"]]
            model["merges"] = [pair for pair in pairs if not {*pair, "".join(pair)} & new.keys()]
        if model.get("unk_token") in new:
            model["unk_token"] = new[model["unk_token"]]
        about["post_processor"] = None  # it adds special tokens, by their names
        return about


class Tokenizing:
    """An engine that makes tokens and texts with one tokenizer."""

    _tokenizer: ChatTokenizer

    def render(self, messages: list[dict[str, str]]) -> list[int]:
        """Return the tokens of a conversation, ready for the assistant's answer.

        Raises:
            RequestError: the chat template refuses the messages.
        """
        return self._tokenizer.render(messages)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a literal text."""
        return self._tokenizer.encode(text)

    def decoder(self) -> Callable[[int], str]:
        """Return a function that takes the tokens of one answer in turn and gives their text."""
        return self._tokenizer.decoder()

    def spell(self, token: int) -> bytes:
        """Return the bytes of a token's text; none for a control token."""
        return self._tokenizer.spell(token)


def _loaded(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer that gives all of a text, and nothing but it."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _any_of(contents: Iterable[str]) -> re.Pattern[str] | None:
    """Finds the longest of the texts at each place, as the tokenizer does; None finds nothing."""
    longest = sorted(filter(None, contents), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest))) if longest else None
