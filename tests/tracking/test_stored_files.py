"""Files of logged models that are damaged or gone, and who notices."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest
from mlflow.entities import LoggedModelStatus
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

from phi3_mlflow.artifacts.manifests import MANIFEST_NAME, Manifest
from phi3_mlflow.core.errors import EnvironmentProblem, UserError
from phi3_mlflow.flavors.bundle import list_files, mark_files
from phi3_mlflow.tracking import promotion, registry, stored_files
from phi3_mlflow.tracking.registry import VersionName
from phi3_mlflow.tracking.stored_files import refuse_damaged, trouble, whole_files
from tests.conftest import Workspace, own_store

DATA = "artifacts/onnx/model.onnx.data"

Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    with own_store(tmp_path_factory.mktemp("stored")) as place:
        yield place


@pytest.fixture
def name(store: Workspace, request: pytest.FixtureRequest) -> str:
    """Of a registered model that no other test has."""
    return re.sub(r"\W+", "-", request.node.name)


def logged(name: str, files: Path, *, own_manifest: bool = True) -> str:
    """The id of a logged model that is nothing but files; a version of `name` is it."""
    client = registry.client()
    (files / DATA).parent.mkdir(parents=True)
    (files / DATA).write_bytes(os.urandom(20_000))
    (files / "artifacts/onnx/genai_config.json").write_text("{}")
    (files / "MLmodel").write_text("flavors: {}\n")
    if own_manifest:
        digest = list_files(files)
    else:  # as the export step leaves it, inside what older models have
        Manifest.of_directory(files / "artifacts/onnx").write(files / "artifacts/onnx")
    experiment = mlflow.set_experiment("stored").experiment_id
    model = client.create_logged_model(experiment, name="files")
    client.log_model_artifacts(model.model_id, str(files))
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    if own_manifest:
        mark_files(model.model_id, digest)
    mlflow.register_model(f"models:/{model.model_id}", name, tags={"profile": "tiny"})
    return str(model.model_id)


def folder(model_id: str) -> Path:
    repository = stored_files._repository(
        registry.client().get_logged_model(model_id).artifact_location
    )
    found = stored_files.folder_of(repository)
    assert found is not None
    return found


def flip(place: Path) -> None:
    """Other bytes, 4 kB of them; size and modification time stay."""
    file = place / DATA
    before = file.stat()
    with file.open("r+b") as stream:
        stream.seek(8_000)
        old = stream.read(4096)
        stream.seek(8_000)
        stream.write(bytes(byte ^ 255 for byte in old))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def cut(place: Path) -> None:
    os.truncate(place / DATA, 19_999)


def remove(place: Path) -> None:
    (place / DATA).unlink()


def file_for_a_folder(place: Path) -> None:
    shutil.rmtree(place / "artifacts/onnx")
    (place / "artifacts/onnx").write_text("nothing")


DAMAGES = {
    remove: f"{DATA} is missing",
    cut: f"{DATA} has 19999 bytes, 20000 were logged",
    flip: f"{DATA} has other bytes than were logged",
    file_for_a_folder: "genai_config.json is missing",
}


@pytest.mark.parametrize("own_manifest", [True, False])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_found_and_named(
    damage: Damage, own_manifest: bool, name: str, tmp_path: Path
) -> None:
    if not own_manifest and damage is file_for_a_folder:
        pytest.skip("the manifest is in that folder")
    model_id = logged(name, tmp_path / "files", own_manifest=own_manifest)
    assert trouble(model_id) is None
    assert whole_files(f"models:/{name}/1") == folder(model_id)
    damage(folder(model_id))
    assert DAMAGES[damage] in (trouble(model_id) or "")
    for refuse in (whole_files, refuse_damaged):
        with pytest.raises(EnvironmentProblem) as refused:
            refuse(f"models:/{name}/1")
        for words in (f"models:/{name}/1", DAMAGES[damage], "mlflow run . -P profile=tiny"):
            assert words in str(refused.value)


@pytest.mark.parametrize("left", ["nothing", "no MLmodel"])
def test_a_folder_that_is_gone(left: str, name: str, tmp_path: Path) -> None:
    model_id = logged(name, tmp_path / "files")
    if left == "nothing":
        shutil.rmtree(folder(model_id))
    else:
        (folder(model_id) / "MLmodel").unlink()
    assert trouble(model_id) == f"the files of the logged model {model_id} are gone"
    with pytest.raises(EnvironmentProblem, match=f"models:/{name}/1 cannot be used"):
        whole_files(f"models:/{name}/1")


def test_what_looks_untouched_is_read_when_loaded_or_asked_for_only(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that gives back other bytes leaves no trace in a file's times."""

    def stamp(file: Path) -> list[int]:
        return [file.stat().st_size, file.stat().st_mtime_ns]

    monkeypatch.setattr(stored_files, "stamp_of", stamp)
    model_id = logged(name, tmp_path / "files")
    assert trouble(model_id) is None
    flip(folder(model_id))
    assert trouble(model_id) is None
    assert "other bytes" in (trouble(model_id, thorough=True) or "")
    assert "other bytes" in (trouble(model_id) or ""), "what was found once is not forgotten"
    flip(folder(model_id))
    assert trouble(model_id) is None
    flip(folder(model_id))
    with pytest.raises(EnvironmentProblem, match="other bytes"):
        whole_files(f"models:/{name}/1")
    assert "other bytes" in (trouble(model_id) or "")


def test_untouched_files_are_read_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    hashed = stored_files.sha256_of_file

    def counted(file: Path) -> str:
        read.append(file.name)
        return hashed(file)

    monkeypatch.setattr(stored_files, "sha256_of_file", counted)
    model_id = logged(name, tmp_path / "files")
    for _ in range(3):
        assert trouble(model_id) is None
    assert sorted(read) == ["MLmodel", "genai_config.json", "model.onnx.data"]
    (folder(model_id) / DATA).touch()
    assert trouble(model_id) is None
    assert len(read) == 6


@pytest.mark.parametrize("what", ["gone", "garbled", "another"])
def test_the_manifest_itself_is_damaged(what: str, name: str, tmp_path: Path) -> None:
    model_id = logged(name, tmp_path / "files")
    place = folder(model_id)
    if what == "gone":
        (place / MANIFEST_NAME).unlink()
    elif what == "garbled":
        (place / MANIFEST_NAME).write_text("{")
    else:  # somebody changed a file, and the manifest with it
        flip(place)
        list_files(place)
    assert MANIFEST_NAME in (trouble(model_id) or "")
    with pytest.raises(EnvironmentProblem, match=MANIFEST_NAME):
        whole_files(f"models:/{name}/1")


@pytest.mark.parametrize("damage", [remove, cut])
@pytest.mark.parametrize("own_manifest", [True, False])
def test_a_store_elsewhere_is_asked_for_names_and_sizes(
    damage: Damage, own_manifest: bool, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_id = logged(name, tmp_path / "files", own_manifest=own_manifest)
    place = folder(model_id)
    downloaded: list[str] = []
    download = LocalArtifactRepository.download_artifacts

    def counted(self: LocalArtifactRepository, path: str, dst_path: str | None = None) -> str:
        downloaded.append(path)
        return str(download(self, path, dst_path))

    monkeypatch.setattr(stored_files, "folder_of", lambda repository: None)
    monkeypatch.setattr(LocalArtifactRepository, "download_artifacts", counted)
    assert trouble(model_id) is None
    damage(place)
    assert DAMAGES[damage] in (trouble(model_id) or "")
    assert all(path.endswith(MANIFEST_NAME) for path in downloaded)


def test_a_store_that_does_not_answer_is_said(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_id = logged(name, tmp_path / "files")

    def away(self: LocalArtifactRepository, path: str | None = None) -> None:
        raise ConnectionError("nobody at s3://key:secret@store")

    monkeypatch.setattr(stored_files, "folder_of", lambda repository: None)
    monkeypatch.setattr(LocalArtifactRepository, "list_artifacts", away)
    with pytest.raises(EnvironmentProblem, match="cannot be read: nobody at"):
        trouble(model_id)


@pytest.mark.usefixtures("store")
def test_what_never_was_is_bad_input() -> None:
    registry.client()
    for uri in ("models:/m-0123456789abcdef0123456789abcdef", "models:/nobody/1"):
        refuse_damaged(uri)
        with pytest.raises(UserError, match="no such model"):
            whole_files(uri)


def test_a_deleted_model_is_named(name: str, tmp_path: Path) -> None:
    model_id = logged(name, tmp_path / "files")
    registry.client().delete_logged_model(model_id)
    with pytest.raises(EnvironmentProblem, match="is no longer in MLflow"):
        refuse_damaged(f"models:/{name}/1")


def test_a_damaged_version_is_not_promoted_and_gives_its_alias_to_the_same_model(
    name: str,
    tmp_path: Path,
) -> None:
    model_id = logged(name, tmp_path / "files")
    mlflow.register_model(f"models:/{model_id}", name)
    passed = {"gate": "passed", "gate_decision": "promote", "gate_against": "none"}
    one, two = VersionName(name, "1"), VersionName(name, "2")
    for version, more in ((one, {}), (two, {"gate_decision": "keep", "gate_against": "1"})):
        registry.set_tags(version, {**passed, "artifact_sha256": "a", **more})
    assert promotion.promote(one, overrule=False).moved
    assert "the same model" in promotion.promote(two, overrule=False).reason
    cut(folder(model_id))
    for overrule in (False, True):
        with pytest.raises(EnvironmentProblem, match=f"models:/{name}/2 cannot be used"):
            promotion.promote(two, overrule=overrule)


def test_the_same_model_logged_anew_takes_the_place_of_a_damaged_champion(
    name: str,
    tmp_path: Path,
) -> None:
    passed = {"gate": "passed", "gate_decision": "promote", "gate_against": "none"}
    model_id = logged(name, tmp_path / "files")
    one, two = VersionName(name, "1"), VersionName(name, "2")
    registry.set_tags(one, {**passed, "artifact_sha256": "a"})
    promotion.promote(one, overrule=False)
    logged(name, tmp_path / "again")
    evaluated = {**passed, "gate_decision": "keep", "gate_against": "1", "artifact_sha256": "a"}
    registry.set_tags(two, evaluated)
    assert not promotion.promote(two, overrule=False).moved
    cut(folder(model_id))
    done = promotion.promote(two, overrule=False)
    assert done.moved
    assert "19999 bytes" in done.reason
    assert registry.describe(two).tags["promotion_forced"] == "false"
    with pytest.raises(EnvironmentProblem, match=f"models:/{name}/1 cannot be used"):
        promotion.rollback(name)
    assert registry.alias_of(name, registry.CHAMPION) == "2"
