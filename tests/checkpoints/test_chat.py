"""A checkpoint is asked, before any work, whether it can hold a conversation and end an answer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from phi3_mlflow.checkpoints.chat import settle_chat
from phi3_mlflow.core.errors import CheckpointRefused
from tests.fixtures.tiny_phi3 import make_tiny

PHI = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("chat") / "plain")


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    return shutil.copytree(plain, tmp_path / "checkpoint")


def with_template(folder: Path, template: object) -> Path:
    """Write the template where old checkpoints have it; a list is several by name."""
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config.pop("chat_template", None)
    if template is not None:
        config["chat_template"] = template
    file.write_text(json.dumps(config))
    return folder


def with_ends(folder: Path, ends: object, eos: str) -> Path:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token": eos}))
    return folder


def test_a_sound_checkpoint_stays_as_it_is(folder: Path) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    found = settle_chat(folder)
    assert (found.changes, found.notes, found.problems) == ((), (), ())
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (None, "there is no chat template"),
        ([{"name": "tool_use", "template": PHI}], "refuses a conversation of one turn"),
        ("{{ broken", "refuses a conversation of one turn"),
        ("{{ raise_exception('no') }}", "refuses a conversation of one turn: no"),
        ("{{ messages[0]['content'] }}<|assistant|>", "leaves out 2 of 3 messages of several"),
        ("Hello<|assistant|>", "leaves out 1 of 1 messages of one turn"),
        ("{{ messages[0]['a']['b'] }}", "refuses a conversation of one turn"),
        (PHI + " " * 200_000, "of one turn: it has 200"),
        # Which of the two limits is met first depends on the machine: text, or time.
        ("{% for a in range(99999) %}" * 3 + "a" + "{% endfor %}" * 3 + PHI, "of one turn: it "),
        ("{{ 'a' * 10**10 }}" + PHI, "it makes too much text"),
    ],
)
def test_templates_that_cannot_be_used(folder: Path, template: object, problem: str) -> None:
    found = settle_chat(with_template(folder, template))
    assert any(problem in line for line in found.problems), found.problems


def test_the_legacy_file_is_named(folder: Path) -> None:
    with_template(folder, None)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": PHI}))
    assert "chat_template.json is read for processors only" in settle_chat(folder).problems[0]


def test_a_template_that_refuses_system_messages_is_told(folder: Path) -> None:
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('none') }}{% endif %}"
    found = settle_chat(with_template(folder, refusing + PHI))
    assert found.problems == ()
    assert found.notes == ("the chat template refuses messages of the system: none",)


@pytest.mark.parametrize("ends", [3, [3], [0], None])
def test_the_end_that_the_template_writes_is_added(folder: Path, ends: object) -> None:
    with_ends(folder, ends, "<s>")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 0}))
    found = settle_chat(folder)
    assert "<|end|> (2) is an end now" in found.changes[0]
    written = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    listed = [0] if ends is None else ends if isinstance(ends, list) else [ends]
    assert written == [*listed, 1, 2]  # <s> is the tokenizer's own
    assert settle_chat(folder).changes == ()


def test_without_a_generation_config_one_is_made(folder: Path) -> None:
    with_ends(folder, None, "<s>")
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 0}))
    assert settle_chat(folder).changes
    assert json.loads((folder / "generation_config.json").read_text()) == {
        "eos_token_id": [0, 1, 2]
    }


@pytest.mark.parametrize("template", [
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}<|assistant|>",
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
])  # fmt: skip
def test_a_template_without_an_end_is_told(folder: Path, template: str) -> None:
    found = settle_chat(with_template(folder, template))
    assert found.changes == ()
    assert "writes no token that ends an answer" in found.notes[0]


def test_a_system_message_of_the_templates_own_ends_as_answers_do(folder: Path) -> None:
    own = "{% if messages[0]['role'] != 'system' %}<|system|>Be kind.<|end|>{% endif %}"
    found = settle_chat(with_template(folder, own + PHI))
    assert (found.changes, found.notes, found.problems) == ((), (), ())


def test_what_transformers_cannot_load_is_refused_in_a_sentence(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rms_norm_eps": "small"}))
    with pytest.raises(CheckpointRefused, match=r"transformers cannot load config\.json"):
        settle_chat(folder)
