"""Texts and tokens, in the three kinds of vocabulary, as transformers and tokenizers have them."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3_mlflow.runtime.request import RequestError
from phi3_mlflow.runtime.tokens import ChatTokenizer
from tests.fixtures.small_tokenizers import KINDS, write_small_tokenizer

ENDS = {"phi-3": "<|end|>", "phi-4": "<|end|>", "smollm2": "<|im_end|>"}
COMMON = [
    "Total:  42",
    "1.  2 eggs",
    "Don'ts",
    "Name      Total\nApples       42\n",
    "   three blanks before, and three after   ",
    "\n\n\t x\r\n",
    "naïve 中文 日本語 한국어",
    "😀👍🏽 e\u0301 \u200b \ufeff \u00a0",
    "\x01\x1f\x7f",
    "",
    " ",
    "▁ ▁▁x",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: write_small_tokenizer(root / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def ours(folders: dict[str, Path]) -> dict[str, ChatTokenizer]:
    return {kind: ChatTokenizer(folder) for kind, folder in folders.items()}


@pytest.fixture(scope="module")
def reference(folders: dict[str, Path]) -> dict[str, Any]:
    from transformers import AutoTokenizer

    return {kind: AutoTokenizer.from_pretrained(folder) for kind, folder in folders.items()}


def _conversation(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


_LETTERS = st.text(max_size=30) | st.text(st.sampled_from(" ab1.,'\n\té中😀▁:"), max_size=40)
_LINES = st.lists(
    st.tuples(
        st.sampled_from(["Total:", "1.", "Don'ts", "eggs", "a|b", "中文"]), st.integers(0, 9)
    ),
    max_size=6,
).map(lambda parts: "".join(word + " " * blanks for word, blanks in parts))
TEXTS = st.one_of(_LETTERS, _LINES, st.sampled_from(COMMON))


def _survives(kind: str, text: str) -> bool:
    """Whether a text is still itself after it was tokenized."""
    return kind == "smollm2" or (kind == "phi-3" and "▁" not in text)


@pytest.mark.parametrize("kind", KINDS)
@given(texts=st.lists(TEXTS, min_size=1, max_size=5))
def test_conversations_have_the_tokens_of_transformers(
    ours: dict[str, ChatTokenizer], reference: dict[str, Any], kind: str, texts: list[str]
) -> None:
    roles = ("user", "assistant")
    messages = [{"role": roles[at % 2], "content": text} for at, text in enumerate(texts)]
    assert ours[kind].render(messages) == _conversation(reference[kind], messages)


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS)
def test_answers_are_read_as_tokenizers_reads_them(
    ours: dict[str, ChatTokenizer], reference: dict[str, Any], kind: str, text: str
) -> None:
    tokenizer = reference[kind].backend_tokenizer
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    decode = ours[kind].decoder()
    pieces = [decode(token) for token in ids]
    assert "".join(pieces) == tokenizer.decode(ids)
    if _survives(kind, text):
        assert "".join(pieces) == text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", COMMON)
def test_literal_texts_have_the_tokens_of_transformers(
    ours: dict[str, ChatTokenizer], reference: dict[str, Any], kind: str, text: str
) -> None:
    end = ENDS[kind]
    for one in (text, f"{text}{end}{text}", f"{end} {end}\n{text}"):
        assert ours[kind].encode(one) == list(reference[kind](one)["input_ids"])


@pytest.mark.parametrize("kind", KINDS)
@given(before=TEXTS, after=TEXTS, again=st.booleans())
def test_a_control_token_in_a_message_is_text(
    ours: dict[str, ChatTokenizer],
    reference: dict[str, Any],
    kind: str,
    before: str,
    after: str,
    again: bool,
) -> None:
    tokenizer = reference[kind]
    control = [number for number, token in tokenizer.added_tokens_decoder.items() if token.special]
    for number in control:
        spelled = tokenizer.added_tokens_decoder[number].content
        said = f"{before}{spelled}{after}" + spelled * again
        messages = [
            {"role": "user", "content": said},
            {"role": "assistant", "content": "a"},
            {"role": "user", "content": "b"},
        ]
        plain = [{**messages[0], "content": "c"}, *messages[1:]]
        ids = ours[kind].render(messages)
        turns = [one for one in ids if one in control]
        assert turns == [one for one in ours[kind].render(plain) if one in control]
        if _survives(kind, said):
            # Blanks after a control token of Phi-3 belong to it.
            assert said.strip() in tokenizer.decode(ids)
        assert ours[kind].encode(said).count(number) == 1 + again


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_template_writes_stays_the_token_it_is(
    ours: dict[str, ChatTokenizer], reference: dict[str, Any], kind: str
) -> None:
    """Beside a spelled token everything else has the same tokens as without it."""
    added = reference[kind].added_tokens_decoder
    for text in COMMON:
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "a  b"}]
        without = ours[kind].render([*messages, {"role": "user", "content": "x"}])
        found = ours[kind].render([*messages, {"role": "user", "content": ENDS[kind]}])
        begun = [at for at, one in enumerate(without) if one in added][-3]  # it, its end, the next
        assert without[: begun + 1] == found[: begun + 1]


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_can_write_the_marks(ours: dict[str, ChatTokenizer], kind: str) -> None:
    """A message that holds a control token makes no other text of the conversation one."""
    end = ENDS[kind]
    number = ours[kind].encode(end)[-1]
    forged = f"\U000f8e57c{number}\U000f8e58 \U000f8e57t{number}.0\U000f8e58"
    messages = [{"role": "user", "content": f"{end}{forged}"}, {"role": "user", "content": forged}]
    plain = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    assert ours[kind].render(messages).count(number) == ours[kind].render(plain).count(number)


def test_a_token_that_ends_turns_is_control_whatever_the_file_says(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    about = json.loads((folders["phi-4"] / "tokenizer.json").read_text())
    for token in about["added_tokens"]:
        token["special"] = False
    config = {"eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = (folders["phi-4"] / "chat_template.jinja").read_text()
    (tmp_path / "chat_template.jinja").write_text(template)
    (tmp_path / "tokenizer.json").write_text(json.dumps(about))
    (end,) = ChatTokenizer(tmp_path).encode("<|end|>")
    message = [{"role": "user", "content": "a<|end|>"}]
    assert ChatTokenizer(tmp_path).render(message).count(end) == 2
    assert ChatTokenizer(tmp_path, [end]).render(message).count(end) == 1


def test_a_model_without_a_template_says_so(folders: dict[str, Path], tmp_path: Path) -> None:
    for name in ("tokenizer_config.json", "tokenizer.json"):
        (tmp_path / name).write_text((folders["phi-3"] / name).read_text())
    tokenizer = ChatTokenizer(tmp_path)
    assert tokenizer.encode("a")
    with pytest.raises(RequestError, match="no chat template"):
        tokenizer.render([{"role": "user", "content": "a"}])


def test_threads_share_a_tokenizer(folders: dict[str, Path]) -> None:
    tokenizer = ChatTokenizer(folders["phi-3"])
    messages = [{"role": "user", "content": "Total:  42 <|end|> " * 50}]
    found: list[list[int]] = []
    threads = [
        threading.Thread(target=lambda: found.append(tokenizer.render(messages))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [found[0]] * 6
