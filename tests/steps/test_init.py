"""`init`: a first profile that loads, says what the model's files say, and overwrites nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from phi3_mlflow.config.loading import load_profile
from phi3_mlflow.config.starter import EXAMPLE_SOURCE
from phi3_mlflow.core.errors import EXIT_BAD_INPUT
from phi3_mlflow.pipeline.command_line import click_command
from phi3_mlflow.sources.about import front_matter
from phi3_mlflow.stages.init import COMMAND
from tests.fixtures.tiny_phi3 import make_tiny
from tests.sources.hub_server import COMMIT, REPO, HubServer

CARD = """---
license: mit
base_model:
- microsoft/Phi-3-mini-4k-instruct
tags: [a, b]
---
# Mine
"""


def init(*options: str) -> Result:
    return CliRunner().invoke(click_command(COMMAND), list(options))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = tmp_path_factory.mktemp("init") / "mine"
    make_tiny(checkpoint, "phi-3-mini-4k")
    (checkpoint / "README.md").write_text(CARD)
    return checkpoint


def chosen(text: str) -> str:
    """The profile with every choice that is a comment made."""
    return re.sub(r"(?m)^#(?=( *)[a-z_0-9]+:( |$))", "", text)


def test_without_anything_it_is_the_example(folder: Path) -> None:
    done = init()
    assert done.exit_code == 0, done.stderr
    file = folder / "my-model.yaml"
    profile, shipped = load_profile(str(file)), load_profile("phi-3-mini-4k")
    assert profile.source == EXAMPLE_SOURCE == shipped.source
    assert profile.architecture == shipped.architecture
    assert profile.context_length == shipped.context_length
    assert profile.licence == shipped.licence
    assert profile.registered_model == "my-model"
    assert f"step=init status=done profile={file}" in done.stdout
    assert f"profile={file}" in done.stderr


def test_every_choice_can_be_made(folder: Path) -> None:
    assert init().exit_code == 0
    file = folder / "my-model.yaml"
    text = chosen(file.read_text())
    assert text != file.read_text()
    file.write_text(text)
    profile = load_profile(str(file))
    assert profile.train is not None
    assert profile.evaluation.questions == "/path/to/questions.csv"
    assert set(profile.gate.thresholds) == {"accuracy", "kl_mean", "top1_agreement"}


def test_a_folder_is_read(folder: Path, model: Path) -> None:
    (folder / "rows.jsonl").write_text("{}\n")
    (folder / "q.csv").write_text("prompt,answer\na,b\n")
    done = init(
        "--source", f"file:{model}", "--output", "tiny.yaml",
        "--data", "rows.jsonl", "--questions", "q.csv",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    profile = load_profile(str(folder / "tiny.yaml"))
    config = json.loads((model / "config.json").read_text())
    assert profile.source == f"file:{model}"
    assert profile.context_length == config["max_position_embeddings"]
    assert profile.architecture is not None
    assert profile.architecture.hidden_size == config["hidden_size"]
    assert profile.architecture.num_key_value_heads == config["num_key_value_heads"]
    assert profile.licence == "MIT"
    assert profile.description == "mine, made from microsoft/Phi-3-mini-4k-instruct."
    assert profile.remote_code == "refuse"
    assert profile.train is not None
    assert str(profile.train.data) == str(folder / "rows.jsonl")
    assert profile.evaluation.questions == str(folder / "q.csv")


@pytest.fixture
def hub(model: Path, monkeypatch: pytest.MonkeyPatch):
    files = {path.name: path.read_bytes() for path in model.iterdir() if path.is_file()}
    with HubServer(files) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def test_a_repository_is_pinned_and_only_its_small_files_are_read(
    folder: Path, hub: HubServer
) -> None:
    config = json.loads(hub.files["config.json"])
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    hub.files["config.json"] = json.dumps(config).encode()
    done = init("--source", f"hf:{REPO}@main")
    assert done.exit_code == 0, done.stderr
    profile = load_profile(str(folder / "my-model.yaml"))
    assert profile.source == f"hf:{REPO}@{COMMIT}"
    assert profile.base_model == REPO
    assert profile.remote_code == "drop"
    assert not hub.asked("lfs")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--source", "hf:acme/tiny-phi3"), "the revision is missing"),
        (("--source", f"hf:{REPO}@nonsense"), "has no revision"),
        (("--source", "hf:acme/other@main"), "does not exist"),
    ],
)
def test_what_the_hub_does_not_have(
    folder: Path, hub: HubServer, options: tuple[str, ...], words: str
) -> None:
    done = init(*options)
    assert done.exit_code == EXIT_BAD_INPUT
    assert words in done.stderr
    assert not list(folder.iterdir())


def test_offline_it_says_what_to_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = init("--source", f"hf:{REPO}@main")
    assert done.exit_code == EXIT_BAD_INPUT
    assert "leave source out" in done.stderr


def test_nothing_is_overwritten(folder: Path) -> None:
    file = folder / "mine.yaml"
    file.write_text("mine")
    done = init("--output", "mine.yaml")
    assert done.exit_code == EXIT_BAD_INPUT
    assert f"{file} is there, and is not overwritten" in done.stderr
    assert file.read_text() == "mine"
    link = folder / "link.yaml"
    link.symlink_to(folder / "elsewhere.yaml")
    assert init("--output", "link.yaml").exit_code == EXIT_BAD_INPUT
    assert not (folder / "elsewhere.yaml").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--output", "my model.yaml"), "a profile is called NAME.yaml"),
        (("--output", "mine.txt"), "a profile is called NAME.yaml"),
        (("--output", "nowhere/mine.yaml"), "there is no folder"),
        (("--data", "nowhere.jsonl"), "there is no file"),
        (("--questions", "nowhere.csv"), "there is no file"),
        (("--source", "file:nowhere"), "there is no directory"),
        (("--source", "huh"), "it names no scheme"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_written(
    folder: Path, options: tuple[str, ...], words: str
) -> None:
    done = init(*options)
    assert done.exit_code == EXIT_BAD_INPUT, done.output
    assert words in done.stderr
    assert not list(folder.iterdir())


def test_a_model_that_cannot_be_used_is_refused_with_all_reasons(folder: Path) -> None:
    model = folder / "gpt"
    model.mkdir()
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "hidden_act": "none"}
    (model / "config.json").write_text(json.dumps(config))
    done = init("--source", f"file:{model}")
    assert done.exit_code == EXIT_BAD_INPUT
    assert "model_type" in done.stderr
    assert "hidden_act" in done.stderr


def test_a_model_of_mlflows_is_taken_by_name(folder: Path) -> None:
    done = init("--source", "models:/mine@champion")
    assert done.exit_code == 0, done.stderr
    text = (folder / "my-model.yaml").read_text()
    assert load_profile(str(folder / "my-model.yaml")).source == "models:/mine@champion"
    assert "was not read" in text
    assert "does not say" in text


@pytest.mark.parametrize(
    ("card", "found"),
    [
        (b"", {}),
        (b"# A heading\n---\nlicense: mit\n---\n", {}),
        (b"---\nlicense: [\n---\n", {}),
        (b"---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}),
        (b"---\n- a\n---\n", {}),
        (b"---\nlicense: mit\n", {"license": "mit"}),
        (b"---\nlicense: \xff\xfe\n---\n", {"license": "\ufffd\ufffd"}),
        (b"---\na: !!python/object/apply:os.system [ls]\n---\n", {}),
    ],
)
def test_a_card_may_be_anything(card: bytes, found: dict[str, str]) -> None:
    assert front_matter(card) == found


@pytest.mark.parametrize("name", ["yes", "null", "a: b", "# no", "'", "1.5", "ü", "{a}", "- x"])
def test_any_word_of_a_card_stays_a_text(folder: Path, model: Path, name: str) -> None:
    mine = folder / "model"
    mine.mkdir()
    (mine / "config.json").write_bytes((model / "config.json").read_bytes())
    (mine / "README.md").write_text(f"---\n{yaml.safe_dump({'license': name})}---\n")
    assert init("--source", f"file:{mine}").exit_code == 0
    assert load_profile(str(folder / "my-model.yaml")).licence == name
