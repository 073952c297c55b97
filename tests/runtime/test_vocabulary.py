from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3_mlflow.runtime.vocabulary import Vocabulary


def _text(vocabulary: Vocabulary, ids: list[int]) -> str:
    decode = vocabulary.decoder()
    return "".join(decode(token) for token in ids)


def _unfinished(text: str) -> str:
    """Without the sign for a character that the last token left unfinished."""
    return text.rstrip("�")


@given(ids=st.lists(st.integers(0, 319), max_size=30))
def test_byte_level_tokens_read_as_tokenizers_reads_them(checkpoint: Path, ids: list[int]) -> None:
    from tokenizers import Tokenizer

    reference = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    found = _text(Vocabulary(checkpoint), ids)
    assert _unfinished(found) == _unfinished(reference.decode(ids))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of the kind that Phi-3 has: SentencePiece's pieces, bytes for the rest."""
    from tokenizers import AddedToken, Tokenizer, decoders, models

    vocab = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}}
    for piece in ("▁", "▁Madrid", "a", "é", "▁the", "d", "▁▁", "中"):
        vocab[piece] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.add_tokens([AddedToken("<|tool|>", special=False, normalized=False)])
    folder = tmp_path_factory.mktemp("pieces")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@given(ids=st.lists(st.integers(257, 266), max_size=12))
def test_sentencepiece_tokens_read_as_tokenizers_reads_them(pieces: Path, ids: list[int]) -> None:
    from tokenizers import Tokenizer

    reference = Tokenizer.from_file(str(pieces / "tokenizer.json"))
    assert _text(Vocabulary(pieces), ids) == reference.decode(ids)


def test_bytes_of_a_character_come_together(pieces: Path) -> None:
    decode = Vocabulary(pieces).decoder()
    assert [decode(byte + 1) for byte in "😀".encode()] == ["", "", "", "😀"]
    assert decode(0xF0 + 1) == ""
    assert decode(259) == "�a", "what follows a character that is never finished is not lost"


def test_a_tokenizer_of_another_kind_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    about = json.loads((checkpoint / "tokenizer.json").read_text())
    about["decoder"] = {"type": "WordPiece"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="WordPiece"):
        Vocabulary(tmp_path)
