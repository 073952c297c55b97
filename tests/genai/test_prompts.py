"""Where the two flavors make other tokens of a conversation, `export` refuses the model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from phi3_mlflow.artifacts.cache import StepCache
from phi3_mlflow.config.parameters import read_request
from phi3_mlflow.core.errors import EXIT_BAD_INPUT, CheckpointRefused
from phi3_mlflow.genai.export import ExportReport, export_onnx
from phi3_mlflow.genai.prompts import refuse_other_prompts
from phi3_mlflow.pipeline.step import carry_out
from phi3_mlflow.runtime.tokens import ChatTokenizer
from phi3_mlflow.stages import export
from tests.conftest import Workspace
from tests.fixtures.tiny_line import write_profile
from tests.fixtures.tiny_phi3 import make_tiny


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    make_tiny(folder / "checkpoint")
    export_onnx(folder / "checkpoint", folder / "onnx", precision="fp32")
    return folder


def test_the_same_tokens(plain: Path) -> None:
    assert refuse_other_prompts(plain / "checkpoint", plain / "onnx") == []


def test_a_difference_is_counted(plain: Path, tmp_path: Path) -> None:
    other = shutil.copytree(plain / "checkpoint", tmp_path / "checkpoint")
    file = other / "chat_template.jinja"
    file.write_text(file.read_text().replace("<|end|>", "\n<|end|>"))
    with pytest.raises(CheckpointRefused) as refused:
        refuse_other_prompts(other, plain / "onnx")
    found = [line for line in str(refused.value).splitlines() if "a conversation with" in line]
    assert len(found) == 3
    assert "one turn: 7 tokens in the ONNX flavor, 8 with" in found[0]


@pytest.fixture
def split_otherwise(plain: Path, tmp_path: Path) -> Path:
    """A tokenizer.json that takes words apart in another way than transformers was told to."""
    checkpoint = shutil.copytree(plain / "checkpoint", tmp_path / "checkpoint")
    built = shutil.copytree(plain / "onnx", tmp_path / "onnx")
    file = built / "tokenizer.json"
    about = json.loads(file.read_text())
    about["normalizer"] = {"type": "Lowercase"}
    file.write_text(json.dumps(about))
    return checkpoint


def test_other_tokens_of_a_conversation_are_refused(split_otherwise: Path) -> None:
    with pytest.raises(CheckpointRefused) as refused:
        refuse_other_prompts(split_otherwise, split_otherwise.parent / "onnx")
    assert refused.value.exit_code == EXIT_BAD_INPUT
    for words in ("one turn", "several turns", "a system message", "save_pretrained", "prompt"):
        assert words in str(refused.value)


def test_other_tokens_of_a_text_are_only_told(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = ChatTokenizer.encode

    def other(self: ChatTokenizer, text: str) -> list[int]:
        return encode(self, text)[::-1]

    assert refuse_other_prompts(plain / "checkpoint", plain / "onnx") == []
    monkeypatch.setattr(ChatTokenizer, "encode", other)
    found = refuse_other_prompts(plain / "checkpoint", plain / "onnx")
    assert len(found) == 3
    assert "Total" in found[0]


def test_the_step_refuses_it_and_keeps_nothing(
    split_otherwise: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A builder that writes another tokenizer than the checkpoint's stands for one that would."""

    def built(checkpoint: Path, out: Path, **settings: object) -> Any:
        shutil.copytree(split_otherwise.parent / "onnx", out, dirs_exist_ok=True)
        return ExportReport("fp32", "cpu", 0, 0, 0.0)

    profile = write_profile(workspace.folder, precision="fp32")
    monkeypatch.setattr("phi3_mlflow.genai.export.export_onnx", built)
    values = {"profile": str(profile), "checkpoint": str(split_otherwise), "quiet": "true"}
    with pytest.raises(CheckpointRefused, match="other tokens in the ONNX flavor"):
        carry_out(export.STEP, read_request(export.STEP.parameters, values))
    assert StepCache(workspace.cache).entries() == []


def test_a_template_of_several_lines_makes_the_same_tokens(plain: Path, tmp_path: Path) -> None:
    """Without signs that take blanks away, and with methods of texts."""
    checkpoint = shutil.copytree(plain / "checkpoint", tmp_path / "checkpoint")
    (checkpoint / "chat_template.jinja").write_text(
        "{% for m in messages %}\n    {% if m.role.upper() == 'USER' %}\n<|user|>\n"
        "    {% else %}\n<|{{ m['role'] }}|>\n    {% endif %}\n"
        "{{ m['content'].replace('\\r', '') }}<|end|>\n{% endfor %}\n<|assistant|>\n"
    )
    export_onnx(checkpoint, tmp_path / "onnx", precision="fp32")
    assert refuse_other_prompts(checkpoint, tmp_path / "onnx") == []


def test_what_the_template_refuses_is_not_compared(plain: Path, tmp_path: Path) -> None:
    other = shutil.copytree(plain / "checkpoint", tmp_path / "checkpoint")
    file = other / "chat_template.jinja"
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    file.write_text(refusing + file.read_text())
    assert refuse_other_prompts(other, plain / "onnx") == []
    assert json.loads((other / "config.json").read_text())
