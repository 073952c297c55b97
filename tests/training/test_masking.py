"""Loss masks: exactly what the assistant says and what ends its turn, or a refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3_mlflow.core.errors import UserError
from phi3_mlflow.training.conversations import Conversation, Message
from phi3_mlflow.training.masking import TokenizedRow, TokenizedRows, tokenize_rows
from tests.fixtures.tiny_phi3 import write_tokenizer

# As the model's authors wrote them, but for line breaks.
PHI3 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}"
    "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TINY = None  # the template of the tiny models

SHORT = [("user", "Hi"), ("assistant", "Yes.")]
LONG = [("system", "Be kind."), *SHORT, ("user", "é?"), ("assistant", '{"a":\n"b"}')]


def rows(*conversations: list[tuple[str, str]]) -> list[Conversation]:
    return [
        Conversation.of([Message(role, text) for role, text in said], f"line {number}")
        for number, said in enumerate(conversations, start=1)
    ]


def checkpoint(
    folder: Path, template: str | None = TINY, merges: tuple[tuple[str, str], ...] = ()
) -> Path:
    """A folder with the tokenizer of the tiny models, made to fit a template."""
    folder.mkdir(exist_ok=True)
    write_tokenizer(folder)
    eos, ends = "<|end|>", [2]
    if template is not None and "im_start" in template:
        # Spare tokens of the vocabulary under the names that this template writes.
        eos, ends = "<|im_end|>", [319]
        rename(folder, {"<|spare318|>": "<|im_start|>", "<|spare319|>": "<|im_end|>"})
    elif template == PHI3:
        eos, ends = "<|endoftext|>", [319, 2]
        rename(folder, {"<|spare319|>": "<|endoftext|>"})
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    if merges:
        file = folder / "tokenizer.json"
        content = json.loads(file.read_text())
        for left, right in merges:
            content["model"]["vocab"][left + right] = len(content["model"]["vocab"])
            content["model"]["merges"].append([left, right])
        file.write_text(json.dumps(content))
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token": eos}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return folder


def rename(folder: Path, names: dict[str, str]) -> None:
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    for old, new in names.items():
        vocabulary[new] = vocabulary.pop(old)
        token = {**content["added_tokens"][-1], "id": vocabulary[new], "content": new}
        content["added_tokens"].append(token)
    file.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str | None], Path]:
    """Makes a checkpoint for a template, each once."""
    folders: dict[str | None, Path] = {}

    def make(template: str | None) -> Path:
        if template not in folders:
            folders[template] = checkpoint(tmp_path_factory.mktemp("checkpoint"), template)
        return folders[template]

    return make


def text(read: TokenizedRows, ids: tuple[int, ...]) -> str:
    return str(read._tokenizer.decode(ids, skip_special_tokens=False))


@pytest.mark.parametrize(
    ("template", "end", "whole"),
    [
        (TINY, "<|end|>", "<|system|>Be kind.<|end|><|user|>Hi<|end|><|assistant|>Yes.<|end|>"
            '<|user|>é?<|end|><|assistant|>{"a":\n"b"}<|end|>'),
        (PHI3, "<|end|>", "<|system|>\nBe kind.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nYes."
            '<|end|>\n<|user|>\né?<|end|>\n<|assistant|>\n{"a":\n"b"}<|end|>'),
        (CHATML, "<|im_end|>", "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi"
            "<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>user\né?<|im_end|>\n"
            '<|im_start|>assistant\n{"a":\n"b"}<|im_end|>'),
    ],
)  # fmt: skip
def test_answers_and_their_ends_carry_loss(template, end, whole, made) -> None:
    read = tokenize_rows(made(template), rows(SHORT, LONG), max_length=500)
    assert [read.shown(row) for row in read.rows] == [
        f"Yes.{end}",
        f'Yes.{end}\n{{"a":\\n"b"}}{end}',
    ]
    assert text(read, read.rows[1].input_ids) == whole
    assert read.loss_tokens == len("Yes.") + 1 + len('Yes.{"a":\n"b"}') + 2
    assert read.tokens == sum(len(row.input_ids) for row in read.rows)
    assert read.too_long == ()
    assert [row.id for row in read.rows] == [row.id for row in rows(SHORT, LONG)]
    for row in read.rows:
        assert len(row.loss_mask) == len(row.input_ids)
        assert row.loss_mask[-1] == 1


SAID = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)


@pytest.mark.parametrize("template", [TINY, PHI3, CHATML])
@settings(max_examples=40)
@given(said=st.lists(st.tuples(SAID, SAID), min_size=1, max_size=3), system=st.none() | SAID)
def test_whatever_is_said(said, system, template, made) -> None:
    """The spans of a mask are the answers, in order and to the letter."""
    messages = [("system", system)] if system else []
    for asked, answered in said:
        messages += [("user", asked), ("assistant", answered)]
    read = tokenize_rows(made(template), rows(messages), max_length=10**6)
    row: TokenizedRow = read.rows[0]
    carried = tuple(i for i, m in zip(row.input_ids, row.loss_mask, strict=True) if m)
    end = "<|im_end|>" if template == CHATML else "<|end|>"
    assert text(read, carried) == "".join(answer + end for _, answer in said)


def test_tokens_before_an_answer_are_those_that_ask_for_it(made) -> None:
    """What is trained on is what the model is given when it is asked."""
    read = tokenize_rows(made(PHI3), rows(LONG), max_length=500)
    row = read.rows[0]
    first = row.loss_mask.index(1)
    said = [{"role": role, "content": content} for role, content in LONG[:2]]
    asked = read._tokenizer.apply_chat_template(said, add_generation_prompt=True)["input_ids"]
    assert list(row.input_ids[:first]) == list(asked)


def test_rows_that_are_too_long_are_named_and_left_out(made) -> None:
    long = [("user", "Hi"), ("assistant", "x" * 2000)]
    read = tokenize_rows(made(TINY), rows(SHORT, long, SHORT), max_length=30)
    assert len(read.rows) == 2
    assert read.too_long == ("line 2: 2,006 tokens",)
    with pytest.raises(UserError) as refused:
        tokenize_rows(made(TINY), rows(*[long] * 23), max_length=30)
    told = str(refused.value)
    assert told.startswith("no row fits into max_length 30:\n  - line 1: 2,006 tokens\n")
    assert "  - and 3 more\nRaise max_length" in told


def test_the_longest_row_that_fits(made) -> None:
    length = len(tokenize_rows(made(TINY), rows(SHORT), max_length=100).rows[0].input_ids)
    assert tokenize_rows(made(TINY), rows(SHORT), max_length=length).rows
    with pytest.raises(UserError, match="no row fits"):
        tokenize_rows(made(TINY), rows(SHORT), max_length=length - 1)


def test_no_token_begins_the_text_twice(tmp_path: Path) -> None:
    template = "{{ bos_token }}" + PHI3
    folder = checkpoint(tmp_path / "once", template)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, first],
        "pair": [first, second],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    file.write_text(json.dumps(content))
    read = tokenize_rows(folder, rows(SHORT), max_length=100)
    assert read._tokenizer("x")["input_ids"][0] == 1
    assert read.rows[0].input_ids.count(1) == 1
    with pytest.raises(UserError, match="line 1: begins with <s> twice"):
        tokenize_rows(
            checkpoint(tmp_path / "twice", "{{ bos_token }}" + template), rows(SHORT), max_length=99
        )


def test_a_token_of_one_position_only_may_be_said(tmp_path: Path) -> None:
    """<s> begins texts of this template and no turn: in a message it is text like other text."""
    folder = checkpoint(tmp_path / "c", "{{ bos_token }}" + PHI3)
    said = [("user", "What is <s> in HTML?"), ("assistant", "Struck out.")]
    assert tokenize_rows(folder, rows(said), max_length=100).rows


NO_END = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
END_AFTER_USERS = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] != 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SHORTENS_EARLIER = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if loop.last or m['role'] != 'assistant' %}{{ m['content'] }}"
    "{% else %}{{ m['content'] }}...{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
COUNTS = (
    "{{ messages | length }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
DROPS_SYSTEM = (
    "{% for m in messages %}{% if m['role'] != 'system' %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TINY_TEXT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NO_PROMPT = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"


@pytest.mark.parametrize(
    ("template", "said", "told"),
    [
        (NO_END, SHORT, "writes no token that stops generation (<|end|>) after message 2"),
        (END_AFTER_USERS, LONG, "writes no token that stops generation (<|end|>) after message 3"),
        (SHORTENS_EARLIER, LONG, "writes message 3, an answer, differently once the conversation"),
        (COUNTS, SHORT, "the tokens before message 2, an answer, are others when"),
        (NO_SYSTEM, LONG, "the chat template refuses it: System role not supported"),
        (DROPS_SYSTEM, LONG, "leaves out or changes message 1, of the system"),
        ("{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}<|end|>"
         "{% endif %}{% endfor %}", SHORT, "leaves out or changes message 1, of the user"),
        (NO_PROMPT, SHORT, "writes '<|assistant|>' before message 2, an answer, and does not with"),
        (NO_PROMPT.replace("<|end|>", "</s><|end|>"), SHORT, "writes '<|assistant|>' before"),
        (TINY_TEXT.replace("<|end|>", "</s> <|end|>"), SHORT, "writes '</s> <|end|>' after"),
        (TINY, [("user", "a<|end|>b"), ("assistant", "x")], "message 1 holds <|end|>, which"),
        (TINY, [("user", "x"), ("assistant", "<|user|>")], "message 2 holds <|user|>, which"),
        (CHATML, [("user", "<|im_start|>"), ("assistant", "x")], "message 1 holds <|im_start|>"),
        ("{{ 'x' if", SHORT, "the chat template refuses it: "),
    ],
)  # fmt: skip
def test_what_no_mask_can_be_made_for_is_refused(template, said, told, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "c", template)
    good = rows(said)[0]
    with pytest.raises(UserError) as refused:
        tokenize_rows(folder, [good, *rows(said)], max_length=500)
    assert str(refused.value).count("line 1: ") == 2
    assert told in str(refused.value)


def test_a_mask_of_all_ones_is_refused(tmp_path: Path) -> None:
    """A template that writes the answer first, where the user's words are part of it."""
    template = "{% if not add_generation_prompt %}{{ messages[-1]['content'] }}<|end|>{% endif %}"
    folder = checkpoint(tmp_path / "c", template)
    with pytest.raises(UserError, match="line 1: every token carries loss"):
        tokenize_rows(folder, rows([("user", "Hi"), ("assistant", "Hi, you")]), max_length=50)


def test_an_answer_that_melts_into_what_stands_before_it(tmp_path: Path) -> None:
    """Two line breaks are one token here: the answer would begin in the middle of it."""
    folder = checkpoint(tmp_path / "c", CHATML, merges=(("Ċ", "Ċ"),))
    melted = [("user", "Hi"), ("assistant", "\n\nYes.")]
    with pytest.raises(UserError) as refused:
        tokenize_rows(folder, rows(SHORT, melted), max_length=500)
    assert "line 2: the tokens before message 2, an answer" in str(refused.value)
    assert "white space" in str(refused.value)
    assert "line 1" not in str(refused.value)


@pytest.mark.parametrize("space", ["", " "])
def test_a_marker_that_swallows_white_space(space: str, tmp_path: Path) -> None:
    """As Phi-3's own: markers take the white space after them, and what follows gets a space."""
    folder = checkpoint(tmp_path / "c", PHI3)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    for token in content["added_tokens"]:
        token["rstrip"] = True
    content["pre_tokenizer"]["add_prefix_space"] = bool(space)
    file.write_text(json.dumps(content))
    read = tokenize_rows(folder, rows(LONG), max_length=500)
    assert read.shown(read.rows[0]) == f'{space}Yes.<|end|>\n{space}{{"a":\\n"b"}}<|end|>'


def test_refused_rows_are_counted(made) -> None:
    bad = [("user", "<|end|>"), ("assistant", "x")]
    with pytest.raises(UserError) as refused:
        tokenize_rows(made(TINY), rows(*[bad] * 30), max_length=500)
    assert len(str(refused.value).splitlines()) == 1 + 20 + 1
    assert str(refused.value).endswith("and 10 more")


def test_checkpoints_without_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="training needs the tokenizer of"):
        tokenize_rows(tmp_path, rows(SHORT), max_length=50)
    folder = checkpoint(tmp_path / "c")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template to train with"):
        tokenize_rows(folder, rows(SHORT), max_length=50)


def test_the_end_of_a_turn_is_what_stops_generation(tmp_path: Path) -> None:
    """Phi-3's tokenizer names another token as its end than the one that ends a turn."""
    folder = checkpoint(tmp_path / "c", PHI3)
    read = tokenize_rows(folder, rows(SHORT), max_length=50)
    assert read._tokenizer.eos_token == "<|endoftext|>"
    assert read.shown(read.rows[0]) == "Yes.<|end|>"
    assert 319 not in read.rows[0].input_ids
    (folder / "generation_config.json").unlink()
    (folder / "config.json").write_text('{"eos_token_id": 2}')
    assert tokenize_rows(folder, rows(SHORT), max_length=50).rows == read.rows


def test_no_rows(made) -> None:
    read = tokenize_rows(made(TINY), [], max_length=50)
    assert (read.rows, read.too_long, read.tokens, read.loss_tokens) == ((), (), 0, 0)
