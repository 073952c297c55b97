from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3_mlflow.artifacts.manifests import FileEntry, Manifest
from phi3_mlflow.core.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "sub" / "b.bin").write_bytes(b"\0" * 3_000_000)
    Manifest.of_directory(tmp_path).write(tmp_path)
    return tmp_path


def test_a_manifest_reads_back_and_finds_nothing_wrong(folder: Path) -> None:
    manifest = Manifest.read(folder)
    assert [f.path for f in manifest.files] == ["a.txt", "sub/b.bin"]
    assert manifest.total_bytes == 3_000_003
    assert manifest.differences(folder) == []
    assert manifest == Manifest.of_directory(folder)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda d: (d / "a.txt").unlink(), "a.txt: missing"),
        (lambda d: (d / "a.txt").write_text("two"), "a.txt: sha256"),
        (lambda d: (d / "a.txt").write_text("three"), "a.txt: 5 bytes, expected 3"),
        (lambda d: (d / "c").write_text(""), "c: not in the manifest"),
    ],
)
def test_every_kind_of_damage_is_named(folder: Path, harm, words: str) -> None:
    harm(folder)
    assert any(words in line for line in Manifest.read(folder).differences(folder))


def test_names_and_sizes_alone_do_not_see_changed_content(folder: Path) -> None:
    (folder / "a.txt").write_text("two")
    assert Manifest.read(folder).differences(folder, hashes=False) == []


@pytest.mark.parametrize(
    "content", ["", "{}", '{"files": [1]}', "\x00", '{"files": [{"path": 1}]}']
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match="is not a manifest"):
        Manifest.read(tmp_path)


entries = st.lists(
    st.builds(
        FileEntry,
        path=st.text("abc/\n", min_size=1, max_size=6),
        size=st.integers(0, 2**40),
        sha256=st.text("0123456789abcdef", min_size=64, max_size=64),
    ),
    max_size=4,
)


@given(entries, entries)
def test_digests_are_equal_exactly_for_equal_content(one: list, other: list) -> None:
    assert (Manifest(tuple(one)).digest == Manifest(tuple(other)).digest) == (one == other)
