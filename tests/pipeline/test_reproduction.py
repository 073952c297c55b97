"""A recipe and what is made of it: the code, the profile, the comparison."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from phi3_mlflow.artifacts.manifests import FileEntry, Manifest, sha256_of_file
from phi3_mlflow.artifacts.provenance import write_provenance
from phi3_mlflow.config.loading import load_profile, profile_names
from phi3_mlflow.config.parameters import read_request
from phi3_mlflow.core.errors import EXIT_BAD_INPUT, EXIT_DIFFERENT, UserError
from phi3_mlflow.core.git import Origin
from phi3_mlflow.pipeline.command_line import click_command
from phi3_mlflow.pipeline.recipe import METADATA_KEY, Recipe, artifact_libraries, recipe_of
from phi3_mlflow.pipeline.reproduction import Code, changed_libraries, code_at, write_profile
from phi3_mlflow.stages import quantize, reproduce
from phi3_mlflow.tracking import registry
from phi3_mlflow.training.row_files import row_files
from tests.conftest import ROOT, Workspace
from tests.fixtures import tiny_line

COMMIT = "c0ffee" + "0" * 34
FILES = Manifest((FileEntry("model.onnx", 3, "a" * 64), FileEntry("model.onnx.data", 9, "b" * 64)))


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=Test", "-c", "user.email=test@example.com", *arguments]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture
def project(tmp_path: Path) -> tuple[Path, list[str]]:
    """A repository with two commits, and their names."""
    folder = tmp_path / "project"
    folder.mkdir()
    git(folder, "init", "--quiet")
    commits = []
    for text in ("one", "two"):
        (folder / "code").write_text(text)
        git(folder, "add", "code")
        git(folder, "commit", "--quiet", "-m", text)
        commits.append(git(folder, "rev-parse", "HEAD"))
    return folder, commits


def test_the_present_code_is_taken_when_it_is_the_versions(project, tmp_path: Path) -> None:
    folder, (_, two) = project
    assert code_at(two, folder, Origin(two), tmp_path / "place") == Code(folder, two)
    assert not (tmp_path / "place").exists()


def test_another_commit_is_checked_out_beside_the_users_folder(project, tmp_path: Path) -> None:
    folder, (one, two) = project
    (folder / "code").write_text("being worked on")
    code = code_at(one, folder, Origin(f"{two}-dirty"), tmp_path / "place")
    assert (code.commit, code.note) == (one, "")
    assert (code.root / "code").read_text() == "one"
    assert (folder / "code").read_text() == "being worked on"
    assert git(folder, "rev-parse", "HEAD") == two
    assert len(git(folder, "worktree", "list").splitlines()) == 1


def test_a_commit_that_is_only_where_the_clone_came_from(project, tmp_path: Path) -> None:
    folder, (one, two) = project
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", "--depth", "1", folder.as_uri(), str(clone))
    code = code_at(
        one, clone, Origin(two, git(clone, "remote", "get-url", "origin")), tmp_path / "place"
    )
    assert (code.root / "code").read_text() == "one"


@pytest.mark.parametrize(
    ("commit", "words"),
    [
        ("0" * 40, "neither in"),
        ("1" * 40 + "-dirty", "were not committed"),
        ("unknown", "is not known"),
        ("--upload-pack=touch /tmp/x", "is not known"),
    ],
)
def test_code_that_is_not_to_be_had_is_replaced_and_that_is_said(
    project, tmp_path: Path, commit: str, words: str
) -> None:
    folder, (_, two) = project
    code = code_at(commit, folder, Origin(two), tmp_path / "place")
    assert (code.root, code.commit) == (folder, two)
    assert words in code.note
    assert "the present code ran" in code.note


def artifact(folder: Path, **provenance: Any) -> Path:
    folder.mkdir()
    (folder / "model.onnx").write_text("graph")
    known = {"source": "file:model", "source_revision": "1", "lock": {"a": "0" * 64}}
    write_provenance(folder, known | provenance)
    return folder


@pytest.mark.parametrize("name", profile_names())
def test_the_profile_of_a_recipe_decides_the_same_bytes(name: str, tmp_path: Path) -> None:
    request = read_request(("profile",), {"profile": name})
    profile = request.profile
    known = {
        "source": profile.origin,
        "source_revision": COMMIT,
        "lock": profile.sha256 or {"model.safetensors": "0" * 64},
        "precision": profile.precision,
        "quantization": quantize.STEP.settings(request),
    }
    recipe = recipe_of(profile, artifact(tmp_path / "onnx", **known), tmp_path)
    assert recipe is not None
    kept = Recipe.read(json.loads(json.dumps({METADATA_KEY: recipe.metadata()})), "models:/m/1")
    assert kept == recipe
    again = load_profile(str(write_profile(kept, Code(ROOT, COMMIT), tmp_path)))
    assert again.quantization == profile.quantization
    assert again.name == profile.name
    assert again.sha256 == known["lock"]
    if profile.source.startswith("hf:"):
        assert again.source.endswith(f"@{COMMIT}")
    for key in ("base_model", "licence", "remote_code", "precision", "flavor", "runtime"):
        assert getattr(again, key) == getattr(profile, key), key


def test_what_was_done_counts_more_than_what_the_profile_says(tmp_path: Path) -> None:
    profile = load_profile(str(tiny_line.write_profile(tmp_path)))
    known = {"precision": "int4", "quantization": {"algorithm": "k_quant", "block_size": 64}}
    recipe = recipe_of(profile, artifact(tmp_path / "onnx", **known), tmp_path)
    assert recipe is not None
    assert recipe.profile["quantization"] == {"algorithm": "k_quant", "block_size": 64}
    assert recipe.profile["source"] == f"file:{tmp_path / 'model'}"
    assert [file.path for file in recipe.files.files] == ["model.onnx"]


def test_an_artifact_of_unknown_origin_has_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("graph")
    assert recipe_of(load_profile("smollm2-135m"), tmp_path, tmp_path) is None
    with pytest.raises(UserError, match="carries no recipe"):
        Recipe.read({"task": "llm/v1/chat"}, "models:/m/1")
    with pytest.raises(UserError, match="cannot be read"):
        Recipe.read({METADATA_KEY: {"profile": {}}}, "models:/m/1")


def test_calibration_texts_that_have_changed_are_refused(tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("text")
    content = {"name": "p", "quantization": {"calibration": str(texts)}}
    recipe = Recipe(content, sha256_of_file(texts), FILES, {})
    write_profile(recipe, Code(ROOT, COMMIT), tmp_path)
    texts.write_text("other")
    with pytest.raises(UserError, match="calibration texts"):
        write_profile(recipe, Code(ROOT, COMMIT), tmp_path)


def test_libraries_that_moved_are_named() -> None:
    recipe = Recipe({}, None, FILES, {"onnx": "1.0", "torch": "2.0", "gone": "3"})
    now = {"onnx": "1.0", "torch": "2.1"}
    assert changed_libraries(recipe, now) == ["gone 3 -> not installed", "torch 2.0 -> 2.1"]


@pytest.fixture
def registered(workspace: Workspace) -> Recipe:
    """Version 1 of `tiny`, with a recipe and no more."""
    profile = {"name": "tiny", "precision": "int4", "quantization": {}}
    recipe = Recipe(profile, None, FILES, artifact_libraries())
    folder = workspace.folder / "model"
    folder.mkdir()
    content = {"flavors": {"python_function": {}}, "metadata": {METADATA_KEY: recipe.metadata()}}
    (folder / "MLmodel").write_text(yaml.safe_dump(content | {"model_uuid": "0", "run_id": None}))
    client = registry.client()
    client.create_registered_model("tiny")
    tags = {"artifact_sha256": FILES.digest, "git_commit": "unknown", "flavor": "onnx"}
    client.create_model_version("tiny", source=str(folder), tags=tags)
    return recipe


def run_it(workspace: Workspace):
    profile = tiny_line.write_profile(workspace.folder)
    options = ["--profile", str(profile), "--version", "1"]
    return CliRunner().invoke(click_command(reproduce.STEP), options)


def last_run():
    client = registry.client()
    experiment = client.get_experiment_by_name("phi3-mlflow")
    return client.search_runs([experiment.experiment_id], "tags.step = 'reproduce'")[0]


def test_other_bytes_end_with_a_code_of_their_own_and_name_the_files(
    workspace: Workspace, registered: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Manifest((FILES.files[0], FileEntry("model.onnx.data", 9, "c" * 64)))
    monkeypatch.setattr(reproduce, "rebuild", lambda *arguments: made)
    result = run_it(workspace)
    assert result.exit_code == EXIT_DIFFERENT, result.output
    assert "did not come out the same: 1 of 2 files" in result.stderr
    assert f"model.onnx.data: sha256 {'c' * 64}, was {'b' * 64}" in result.stderr
    assert "the present code ran" in result.stderr
    run = last_run()
    assert run.info.status == "FAILED"
    assert (run.data.tags["reproduced"], run.data.metrics["reproduced"]) == ("false", 0.0)
    place = registry.client().download_artifacts(run.info.run_id, "reproduction.json")
    assert json.loads(Path(place).read_text())["artifact_sha256"]["made_again"] == made.digest
    assert len(registry.client().search_model_versions("name='tiny'")) == 1
    assert not list((workspace.cache / "building").iterdir())


def test_the_same_bytes_end_well(
    workspace: Workspace, registered: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reproduce, "rebuild", lambda *arguments: FILES)
    result = run_it(workspace)
    assert result.exit_code == 0, result.output
    assert f"the same: 2 files, artifact_sha256 {FILES.digest}" in result.stderr
    assert last_run().data.tags["reproduced"] == "true"


def test_a_tag_that_is_not_the_recipes_is_bad_input(
    workspace: Workspace, registered: Recipe
) -> None:
    version = registry.VersionName("tiny", "1")
    registry.set_tags(version, {"artifact_sha256": "0" * 64})
    result = run_it(workspace)
    assert result.exit_code == EXIT_BAD_INPUT
    assert "was changed after it was made" in result.stderr


TRAINING = {"learning_rate": 0.001, "lora_r": 4}


def write_rows(file: Path, text: str = "It is broken.") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": f"{n}: {text}", "completion": str(n % 3)} for n in range(30)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def trained_recipe(folder: Path, **train: Any) -> Recipe:
    """The recipe of a version that was fine-tuned on what the profile names."""
    profile = load_profile(str(tiny_line.write_profile(folder, train={**TRAINING, **train})))
    used = {key: row_files(getattr(profile.train, key)) for key in train}
    known = {
        "adapter_sha256": "f" * 64,
        "training": {
            "settings": TRAINING,
            "rows": {
                key: {"sha256": rows.digest, "files": dict(rows.hashes)}
                for key, rows in used.items()
            },
        },
    }
    recipe = recipe_of(profile, artifact(folder / "onnx", **known), folder)
    assert recipe is not None
    content = json.loads(json.dumps({METADATA_KEY: recipe.metadata()}))
    assert Recipe.read(content, "models:/m/1") == recipe
    return recipe


def train_of(recipe: Recipe, folder: Path, data: Path | None = None) -> Any:
    folder.mkdir()
    return load_profile(str(write_profile(recipe, Code(ROOT, COMMIT), folder, data))).train


def test_rows_are_found_where_they_were(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    recipe = trained_recipe(tmp_path, data="rows.jsonl")
    train = train_of(recipe, tmp_path / "again")
    assert train.data == rows
    assert (train.learning_rate, train.lora_r, train.allow_overlap) == (0.001, 4, True)
    assert "peft" in recipe.libraries


def test_the_engine_is_that_of_the_version_or_the_one_there_was(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl")
    recipe = trained_recipe(tmp_path, data="rows.jsonl")
    assert train_of(recipe, tmp_path / "old").engine == "memory"
    named = {**recipe.profile["train"], "engine": "streamed"}
    recipe = replace(recipe, profile={**recipe.profile, "train": named})
    assert train_of(recipe, tmp_path / "new").engine == "streamed"


def test_code_that_knows_no_engine_is_given_none(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl")
    recipe = trained_recipe(tmp_path, data="rows.jsonl")
    earlier = Code(ROOT, COMMIT, present=False)
    content = yaml.safe_load(write_profile(recipe, earlier, tmp_path).read_text("utf-8"))
    assert "engine" not in content["train"]


def test_other_rows_are_refused_with_the_hash_that_is_needed(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    sha256 = sha256_of_file(rows)
    recipe = trained_recipe(tmp_path, data="rows.jsonl")
    write_rows(rows, "It is broken!")
    with pytest.raises(UserError, match=f"sha256 {sha256}; not in {rows}") as told:
        train_of(recipe, tmp_path / "again")
    assert "-P data=" in str(told.value)
    rows.unlink()
    with pytest.raises(UserError, match=sha256):
        train_of(recipe, tmp_path / "and-again", write_rows(tmp_path / "b.jsonl", "Other."))


def test_rows_that_have_moved_are_taken_from_where_the_user_says(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    held = write_rows(tmp_path / "held.jsonl", "It is late.")
    recipe = trained_recipe(tmp_path, data="rows.jsonl", validation="held.jsonl")
    (tmp_path / "archive").mkdir()
    moved = rows.rename(tmp_path / "archive" / "old.jsonl")
    train = train_of(recipe, tmp_path / "again", moved)
    assert (train.data, train.validation) == (moved, held)
    beside = held.rename(tmp_path / "archive" / "held.jsonl")
    train = train_of(recipe, tmp_path / "and-again", moved)
    assert (train.data, train.validation) == (moved, beside)
    beside.unlink()
    with pytest.raises(UserError, match=r"train\.validation: sha256"):
        train_of(recipe, tmp_path / "once-more", moved)


@pytest.mark.parametrize("data", ["rows", "rows/*.jsonl", "rows/**/*.jsonl"])
def test_files_that_came_later_are_left_out(tmp_path: Path, data: str) -> None:
    write_rows(tmp_path / "rows/a.jsonl")
    deep = "**" in data
    if deep:
        write_rows(tmp_path / "rows/deep/b.jsonl", "It is late.")
    recipe = trained_recipe(tmp_path, data=data)
    write_rows(tmp_path / "rows/c.jsonl", "It is new.")
    train = train_of(recipe, tmp_path / "again")
    assert list(row_files(train.data).hashes) == ["a.jsonl", *(["deep/b.jsonl"] if deep else [])]
    assert row_files(train.data).digest == recipe.rows["data"].sha256
    (tmp_path / "rows/a.jsonl").unlink()
    with pytest.raises(UserError, match=r"a\.jsonl \(sha256 .*not all of it in"):
        train_of(recipe, tmp_path / "and-again")


def test_rows_of_the_project_are_those_of_the_versions_commit(tmp_path: Path) -> None:
    data = ROOT / "examples" / "tickets" / "rows" / "tickets.jsonl"
    recipe = trained_recipe(tmp_path, data=str(data))
    assert recipe.rows["data"].place == "project:examples/tickets/rows/tickets.jsonl"
    there = tmp_path / "other" / "examples" / "tickets" / "rows" / "tickets.jsonl"
    there.parent.mkdir(parents=True)
    there.write_bytes(data.read_bytes())
    (tmp_path / "again").mkdir()
    file = write_profile(recipe, Code(tmp_path / "other", COMMIT), tmp_path / "again")
    assert load_profile(str(file)).train.data == there
    there.unlink()  # the commit has no such file: it was added to the checkout later
    file = write_profile(recipe, Code(tmp_path / "other", COMMIT), tmp_path / "again")
    assert load_profile(str(file)).train.data == data


def test_a_fine_tuned_artifact_of_before_has_no_recipe(tmp_path: Path) -> None:
    profile = load_profile(str(tiny_line.write_profile(tmp_path)))
    assert recipe_of(profile, artifact(tmp_path / "onnx", adapter_sha256="f"), tmp_path) is None
    with pytest.raises(UserError, match="was fine-tuned before recipes covered that"):
        Recipe.read({}, "models:/m/1")


def test_data_for_a_version_that_was_not_fine_tuned_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="was not fine-tuned"):
        write_profile(Recipe({"name": "p"}, None, FILES, {}), Code(ROOT, COMMIT), tmp_path, ROOT)
