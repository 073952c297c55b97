"""A local checkpoint directory is copied whole, checked, and never changed."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from phi3_mlflow.core.errors import CheckpointRefused, UserError
from phi3_mlflow.sources.common import FetchedSource
from phi3_mlflow.sources.fetch import fetch_source, resolve_revision
from phi3_mlflow.sources.spec import parse_source
from tests.sources.faults import CountingBar
from tests.sources.raw_checkpoint import tiny_checkpoint, write_files


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A profile's directory, with a checkpoint in `mine` and room for the output."""
    write_files(tmp_path / "mine", tiny_checkpoint())
    (tmp_path / "out").mkdir()
    return tmp_path


def fetch(home: Path, lock: Mapping[str, str] | None = None, source: str = "mine") -> FetchedSource:
    @contextlib.contextmanager
    def progress(_: str, total: int | None) -> Iterator[CountingBar]:
        bar = CountingBar(total)
        yield bar
        assert bar.count == bar.total

    return fetch_source(
        parse_source(f"file:{source}"),
        home / "out",
        sha256=lock or {},
        base_dir=home,
        downloads=home / "downloads",
        progress=progress,
    )


def test_what_is_needed_is_copied(home: Path) -> None:
    files = tiny_checkpoint()
    write_files(home / "mine", {"optimizer.pt": b"\x80", "notes.txt": b"x", "sub/config.json": b""})
    fetched = fetch(home)
    assert {path.name: path.read_bytes() for path in (home / "out").iterdir()} == files
    digests = {name: hashlib.sha256(body).hexdigest() for name, body in files.items()}
    assert {name: digest.sha256 for name, digest in fetched.files.items()} == digests
    assert fetched.lock == digests
    assert fetched.bytes_downloaded == 0
    assert (home / "mine" / "optimizer.pt").exists()


def test_the_revision_is_the_content(home: Path) -> None:
    spec = parse_source("file:mine")
    before = resolve_revision(spec, base_dir=home)
    assert fetch(home).revision == before
    (home / "mine" / "notes.txt").write_text("not part of it")
    (home / "mine" / "config.json").touch()
    assert resolve_revision(spec, base_dir=home) == before
    with (home / "mine" / "LICENSE").open("a") as licence:
        licence.write("!")
    assert resolve_revision(spec, base_dir=home) != before


def test_the_lock_holds(home: Path) -> None:
    lock = fetch(home).lock
    for path in (home / "out").iterdir():
        path.unlink()
    fetch(home, lock)
    for path in (home / "out").iterdir():
        path.unlink()
    weights = home / "mine" / "model-00001-of-00002.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=rf"{weights.name}.*sha256 expected {lock[weights.name]}"):
        fetch(home, lock)
    assert not list((home / "out").iterdir())


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00002.safetensors"])
def test_links_are_refused(home: Path, name: str) -> None:
    (home / "mine" / name).rename(home / "elsewhere")
    (home / "mine" / name).symlink_to(home / "elsewhere")
    with pytest.raises(CheckpointRefused, match=rf"{name} is a link"):
        fetch(home)
    assert not list((home / "out").iterdir())


def test_a_pipe_is_refused(home: Path) -> None:
    (home / "mine" / "tokenizer.json").unlink()
    os.mkfifo(home / "mine" / "tokenizer.json")
    with pytest.raises(CheckpointRefused, match="not a regular file"):
        fetch(home)


def test_a_missing_directory(home: Path) -> None:
    with pytest.raises(UserError, match="there is no directory"):
        fetch(home, source="nowhere")
    with pytest.raises(UserError, match="there is no directory"):
        resolve_revision(parse_source("file:nowhere"), base_dir=home)


def test_no_configuration(home: Path) -> None:
    (home / "mine" / "config.json").unlink()
    with pytest.raises(CheckpointRefused, match=r"has no config\.json"):
        fetch(home)


def test_a_wrong_checkpoint_leaves_nothing(home: Path) -> None:
    (home / "mine" / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointRefused, match="no vocabulary"):
        fetch(home)
    assert not list((home / "out").iterdir())
