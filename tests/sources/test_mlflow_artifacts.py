"""A checkpoint that MLflow holds: in a run, as a model version, or in an artifact store."""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from phi3_mlflow.core.errors import CheckpointRefused, EnvironmentProblem, UserError
from phi3_mlflow.sources.common import FetchedSource
from phi3_mlflow.sources.fetch import fetch_source, resolve_revision
from phi3_mlflow.sources.spec import parse_source
from tests.sources.faults import CountingBar
from tests.sources.raw_checkpoint import tiny_checkpoint, write_files


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tracking store of its own for the tests of this file."""
    import mlflow

    directory = tmp_path_factory.mktemp("tracking")
    before = mlflow.get_tracking_uri()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        uri = f"sqlite:///{directory}/mlflow.db"
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        # Set and removed, so that what MLflow writes there is removed with the patch.
        patch.setenv("MLFLOW_EXPERIMENT_ID", "")
        patch.delenv("MLFLOW_EXPERIMENT_ID")
        mlflow.set_tracking_uri(uri)
        mlflow.create_experiment("sources", artifact_location=(directory / "artifacts").as_uri())
        mlflow.set_experiment("sources")
        yield directory
        mlflow.set_tracking_uri(before)


def logged(directory: Path, files: dict[str, bytes], path: str = "checkpoint") -> str:
    """Log files as artifacts of a new run; returns `runs:/ID/PATH`."""
    import mlflow

    with mlflow.start_run() as run:
        mlflow.log_artifacts(str(write_files(directory, files)), path)
    return f"runs:/{run.info.run_id}/{path}"


def version_of(uri: str, name: str, alias: str) -> str:
    """Register artifacts as a version of a model, under an alias; returns its number."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient()
    with contextlib.suppress(MlflowException):
        client.create_registered_model(name)
    run = uri.split("/")[1]
    source = f"{client.get_run(run).info.artifact_uri}/{uri.split('/', 2)[2]}"
    version = client.create_model_version(name, source, run).version
    client.set_registered_model_alias(name, alias, version)
    return str(version)


def fetch(root: Path, source: str, lock: Mapping[str, str] | None = None) -> FetchedSource:
    @contextlib.contextmanager
    def progress(_: str, total: int | None) -> Iterator[CountingBar]:
        bar = CountingBar(total)
        yield bar
        assert bar.count == bar.total

    (root / "out").mkdir(exist_ok=True)
    return fetch_source(
        parse_source(source),
        root / "out",
        sha256=lock or {},
        base_dir=root,
        downloads=root / "downloads",
        progress=progress,
    )


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_run_s_checkpoint(tracking: Path, tmp_path: Path) -> None:
    files = tiny_checkpoint()
    extra = {"optimizer.pt": b"\x80", "README.md": b"#", "sub/notes.txt": b"x"}
    uri = logged(tmp_path / "mine", files | extra)
    fetched = fetch(tmp_path, uri)
    assert contents(tmp_path / "out") == files
    assert fetched.bytes_downloaded == sum(map(len, files.values()))
    assert fetched.lock == {n: hashlib.sha256(b).hexdigest() for n, b in files.items()}
    assert fetched.revision == resolve_revision(parse_source(uri))
    assert fetched.revision.startswith(f"{uri}#")
    assert not [p for p in (tmp_path / "downloads").rglob("*") if p.suffix == ".safetensors"]


def test_an_alias_is_the_version_it_stands_for(tracking: Path, tmp_path: Path) -> None:
    one = version_of(logged(tmp_path / "one", tiny_checkpoint(1)), "tuned", "champion")
    first = resolve_revision(parse_source("models:/tuned@champion"))
    assert first.startswith(f"models:/tuned/{one}#")
    assert fetch(tmp_path, "models:/tuned@champion").revision == first
    assert contents(tmp_path / "out") == tiny_checkpoint(1)
    two = version_of(logged(tmp_path / "two", tiny_checkpoint(2)), "tuned", "champion")
    assert resolve_revision(parse_source("models:/tuned@champion")).startswith(
        f"models:/tuned/{two}#"
    )
    assert resolve_revision(parse_source(f"models:/tuned/{one}")) == first


def test_a_logged_transformers_model(tracking: Path, tmp_path: Path) -> None:
    files = tiny_checkpoint(2)
    tokenizer = {n: files.pop(n) for n in ("tokenizer.json", "tokenizer_config.json")}
    logged_model = {f"model/{name}": body for name, body in files.items()}
    logged_model |= {f"components/tokenizer/{name}": body for name, body in tokenizer.items()}
    logged_model |= {"MLmodel": b"flavors: {}", "requirements.txt": b"transformers"}
    version = version_of(logged(tmp_path / "mine", logged_model, "model"), "whole", "x")
    fetch(tmp_path, f"models:/whole/{version}")
    assert contents(tmp_path / "out") == files | tokenizer


def test_a_checkpoint_with_an_adapter_beside_it_is_refused(tracking: Path, tmp_path: Path) -> None:
    files = {f"model/{name}": content for name, content in tiny_checkpoint().items()}
    uri = logged(tmp_path / "in", {**files, "peft/adapter_config.json": b"{}"}, "model")
    with pytest.raises(CheckpointRefused, match=r"the model before it was trained.*log_as: merged"):
        fetch(tmp_path, uri)


def test_the_lock_holds(tracking: Path, tmp_path: Path) -> None:
    files = tiny_checkpoint(1)
    uri = logged(tmp_path / "mine", files)
    lock = {name: hashlib.sha256(body).hexdigest() for name, body in files.items()}
    lock["model.safetensors"] = "b" * 64
    with pytest.raises(UserError, match=r"model\.safetensors.*sha256 expected b{64}"):
        fetch(tmp_path, uri, lock)
    assert not list((tmp_path / "out").iterdir())


def test_two_checkpoints_in_one_place(tracking: Path, tmp_path: Path) -> None:
    both = {f"{folder}/{n}": b for folder in ("a", "b") for n, b in tiny_checkpoint(1).items()}
    uri = logged(tmp_path / "mine", both)
    with pytest.raises(UserError, match=rf"several checkpoints.*{uri}/a, {uri}/b"):
        fetch(tmp_path, uri)
    fetch(tmp_path, f"{uri}/b")
    assert contents(tmp_path / "out") == tiny_checkpoint(1)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"notes.txt": b"x"}, "holds no checkpoint"),
        ({"config.json": b"{}", "pytorch_model.bin": b"\x80"}, "pytorch_model.bin"),
        ({"config.json": b"{}"}, "there are no weights"),
    ],
)
def test_artifacts_that_are_no_checkpoint(
    tracking: Path, tmp_path: Path, files: dict[str, bytes], message: str
) -> None:
    uri = logged(tmp_path / "mine", files)
    with pytest.raises(CheckpointRefused, match=message):
        fetch(tmp_path, uri)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "source",
    ["models:/nobody@champion", "models:/nobody/3", f"runs:/{'0' * 32}/checkpoint"],
)
def test_what_mlflow_does_not_have(tracking: Path, tmp_path: Path, source: str) -> None:
    with pytest.raises(UserError, match=r"MLflow says: .*not found"):
        fetch(tmp_path, source)
    with pytest.raises(UserError, match="not found"):
        resolve_revision(parse_source(source))


def test_a_missing_folder_of_a_run(tracking: Path, tmp_path: Path) -> None:
    uri = logged(tmp_path / "mine", tiny_checkpoint(1))
    with pytest.raises(UserError, match="there are no files"):
        fetch(tmp_path, f"{uri}/nothing")


def test_a_store_whose_client_is_not_installed(
    tracking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("boto3", "botocore"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(EnvironmentProblem, match="pip install boto3"):
        fetch(tmp_path, "s3://bucket/checkpoint")


class LyingRepository:
    """An artifact store that lists one thing and gives another."""

    def __init__(self, files: dict[str, bytes], listed: dict[str, int]) -> None:
        self.files, self.listed = files, listed

    def list_artifacts(self, _: str | None) -> list[object]:
        from mlflow.entities import FileInfo

        return [FileInfo(name, False, size) for name, size in self.listed.items()]

    def download_artifacts(self, path: str, dst_path: str) -> str:
        target = Path(dst_path, path)
        target.write_bytes(self.files[path])
        return str(target)


def lying(patch: pytest.MonkeyPatch, files: dict[str, bytes], listed: dict[str, int]) -> None:
    repository = LyingRepository(files, listed)
    patch.setattr("phi3_mlflow.sources.mlflow_artifacts._repository", lambda _: repository)


def test_a_store_that_cuts_files(
    tracking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = tiny_checkpoint(1)
    sizes = {name: len(body) for name, body in files.items()}
    lying(monkeypatch, files | {"model.safetensors": b"short"}, sizes)
    with pytest.raises(EnvironmentProblem, match=r"model\.safetensors.*size expected \d+, found 5"):
        fetch(tmp_path, "s3://bucket/checkpoint")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("name", ["../config.json", "/config.json", "a/../../config.json", "a\\b"])
def test_a_store_with_names_that_leave(
    tracking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    lying(monkeypatch, {}, {name: 1})
    with pytest.raises(CheckpointRefused, match="leaves its place"):
        fetch(tmp_path, "s3://bucket/checkpoint")


def test_whatever_a_client_raises_is_told(
    tracking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: str) -> None:
        raise RuntimeError("https://me:hunter2@store is down")

    monkeypatch.setattr("phi3_mlflow.sources.mlflow_artifacts._repository", broken)
    with pytest.raises(EnvironmentProblem, match="store is down") as told:
        fetch(tmp_path, "s3://bucket/checkpoint")
    assert "hunter2" not in str(told.value)
