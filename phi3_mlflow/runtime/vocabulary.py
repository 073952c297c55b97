"""The text of tokens, from tokenizer.json.

onnxruntime-genai 0.18 loses the text that follows bytes that form no character (a cut emoji, or
sampling at a high temperature): from `decode` all of the rest, from its stream some letters. So the
bytes of each token are taken from the vocabulary here, and both engines read answers alike.
"""

from __future__ import annotations

import codecs
import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_SPACE = "▁"  # how SentencePiece writes a space
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # how it writes a byte that is not a character


class Vocabulary:
    """The bytes of every token of a Hugging Face tokenizer, byte-level or SentencePiece.

    Args:
        folder: holds tokenizer.json.

    Raises:
        ValueError: the tokenizer decodes in a third way.
    """

    def __init__(self, folder: Path) -> None:
        about = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        kinds = set(_decoder_kinds(about.get("decoder") or {}))
        if "ByteLevel" in kinds:
            letters = _byte_letters()
            self._drop_space = False

            def to_bytes(token: str) -> bytes:
                return _from_letters(token, letters)

        elif kinds & {"ByteFallback", "Metaspace"}:
            self._drop_space = bool(kinds & {"Strip", "Metaspace"})
            to_bytes = _from_pieces
        else:
            raise ValueError(
                f"{folder / 'tokenizer.json'}: its decoder ({', '.join(sorted(kinds)) or 'none'}) "
                "is neither byte-level nor SentencePiece's"
            )
        model = about["model"]["vocab"]
        self._bytes = {number: to_bytes(token) for token, number in model.items()}
        for added in about.get("added_tokens") or ():
            # Control tokens are not part of what is said.
            content = "" if added["special"] else added["content"]
            self._bytes[added["id"]] = content.encode()

    def spell(self, token: int) -> bytes:
        """The bytes of a token; none for a control token."""
        return self._bytes.get(token, b"")

    def decoder(self) -> Callable[[int], str]:
        """A function that takes the tokens of one answer in turn and gives their text.

        A character of several tokens comes with the last of them; one that is never finished does
        not come.
        """
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        first = self._drop_space

        def decode(token: int) -> str:
            nonlocal first
            raw = self._bytes.get(token, b"")
            if first and raw:
                first, raw = False, raw.removeprefix(b" ")
            return utf8.decode(raw)

        return decode


def _decoder_kinds(decoder: dict[str, Any]) -> Iterator[str]:
    yield str(decoder.get("type"))
    for inner in decoder.get("decoders") or ():
        yield from _decoder_kinds(inner)


def _from_letters(token: str, letters: dict[str, int]) -> bytes:
    try:
        return bytes(letters[letter] for letter in token)
    except KeyError:
        return token.encode()


def _from_pieces(token: str) -> bytes:
    if byte := _BYTE.fullmatch(token):
        return bytes([int(byte[1], 16)])
    return token.replace(_SPACE, " ").encode()


def _byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in byte-level vocabularies (GPT-2's assignment)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {chr(byte): byte for byte in plain}
    letters.update({chr(256 + at): byte for at, byte in enumerate(others)})
    return letters
