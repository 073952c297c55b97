"""Where the two flavors make other tokens of a conversation, `export` says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from phi3_mlflow.genai.export import export_onnx
from phi3_mlflow.genai.prompts import differing_prompts
from tests.fixtures.tiny_phi3 import make_tiny


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    make_tiny(folder / "checkpoint")
    export_onnx(folder / "checkpoint", folder / "onnx", precision="fp32")
    return folder


def test_the_same_tokens(plain: Path) -> None:
    assert differing_prompts(plain / "checkpoint", plain / "onnx") == []


def test_a_difference_is_counted(plain: Path, tmp_path: Path) -> None:
    other = shutil.copytree(plain / "checkpoint", tmp_path / "checkpoint")
    file = other / "chat_template.jinja"
    file.write_text(file.read_text().replace("<|end|>", "\n<|end|>"))
    found = differing_prompts(other, plain / "onnx")
    assert len(found) == 3
    assert "one turn: 7 tokens in the ONNX flavor, 8 with" in found[0]


def test_a_template_of_several_lines_makes_the_same_tokens(plain: Path, tmp_path: Path) -> None:
    """Without signs that take blanks away, and with methods of texts."""
    checkpoint = shutil.copytree(plain / "checkpoint", tmp_path / "checkpoint")
    (checkpoint / "chat_template.jinja").write_text(
        "{% for m in messages %}\n    {% if m.role.upper() == 'USER' %}\n<|user|>\n"
        "    {% else %}\n<|{{ m['role'] }}|>\n    {% endif %}\n"
        "{{ m['content'].replace('\\r', '') }}<|end|>\n{% endfor %}\n<|assistant|>\n"
    )
    export_onnx(checkpoint, tmp_path / "onnx", precision="fp32")
    assert differing_prompts(checkpoint, tmp_path / "onnx") == []


def test_what_the_template_refuses_is_not_compared(plain: Path, tmp_path: Path) -> None:
    other = shutil.copytree(plain / "checkpoint", tmp_path / "checkpoint")
    file = other / "chat_template.jinja"
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    file.write_text(refusing + file.read_text())
    assert differing_prompts(other, plain / "onnx") == []
    assert json.loads((other / "config.json").read_text())
