"""The cache entry point: nothing that is in use goes, and what is damaged is found."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from filelock import FileLock

from phi3_mlflow.artifacts.cache import Entry, StepCache
from phi3_mlflow.artifacts.provenance import write_provenance
from phi3_mlflow.config.parameters import read_request
from phi3_mlflow.stages import cache
from tests.conftest import Workspace

DAY = 86400


def put(store: StepCache, number: int, *, age_days: float = 0, size: int = 1000) -> Entry:
    key = f"{number:040x}"
    origin = {"parts": {}, "time": time.time()}
    with store.locked("export", key), store.building("export", key, origin) as out:
        (out / "file").write_bytes(bytes([number]) * size)
    entry = store.find("export", key)
    assert entry is not None
    then = time.time() - age_days * DAY
    os.utime(entry.path.parent / "verified.json", (then, then))
    return entry


@pytest.fixture
def store(workspace: Workspace) -> StepCache:
    return StepCache(workspace.cache)


def run(**values: str) -> None:
    cache.COMMAND.run(read_request(cache.COMMAND.parameters, values))


def keys(store: StepCache) -> set[int]:
    return {int(entry.key, 16) for entry in store.entries()}


def test_a_list_changes_nothing(store: StepCache, capsys: pytest.CaptureFixture[str]) -> None:
    put(store, 1, size=2_000_000)
    run()
    captured = capsys.readouterr()
    assert "export" in captured.err
    assert "2.0 MB" in captured.err
    assert "outputs=1 size_mb=2.0 removed=0" in captured.out
    assert keys(store) == {1}


def test_sizes_are_added_up_by_step(store: StepCache, capsys: pytest.CaptureFixture[str]) -> None:
    put(store, 1, size=2_000_000)
    put(store, 2, size=1_000_000)
    download(store, "hf-acme", 500_000)
    run(do="size")
    said = capsys.readouterr().err
    assert [line.split() for line in said.splitlines()] == [
        ["export", "3.0", "MB", "2", "outputs"],
        ["unfinished", "downloads", "0.5", "MB"],
    ]
    assert keys(store) == {1, 2}


def download(store: StepCache, name: str, size: int, age_days: float = 0) -> Path:
    folder = store.downloads / name
    folder.mkdir(parents=True)
    part = folder / "model.safetensors.part"
    part.write_bytes(b"0" * size)
    then = time.time() - age_days * DAY
    for path in (part, folder):
        os.utime(path, (then, then))
    return folder


def test_unfinished_downloads_go_by_age_and_never_from_under_a_fetch(store: StepCache) -> None:
    old, new = download(store, "old", 10, age_days=40), download(store, "new", 10)
    held = download(store, "held", 10, age_days=40)
    with FileLock(str(held) + ".lock"):
        run(do="prune", older_than="30d")
    assert not old.exists()
    assert new.exists()
    assert held.exists()
    run(do="prune", max_size="1GB")
    assert new.exists()
    run(do="prune")
    assert not new.exists()
    assert not held.exists()


def test_what_was_not_used_for_long_is_pruned(store: StepCache) -> None:
    put(store, 1, age_days=40)
    put(store, 2, age_days=20)
    run(do="prune", older_than="30d")
    assert keys(store) == {2}


def test_the_longest_unused_go_until_the_rest_fits(store: StepCache) -> None:
    for number, age in ((1, 1), (2, 3), (3, 2)):
        put(store, number, age_days=age, size=400_000)
    run(do="prune", max_size="0.9MB")
    assert keys(store) == {1, 3}


def test_without_limits_what_a_profile_left_last_stays(store: StepCache) -> None:
    put(store, 1)
    kept = put(store, 2)
    store.set_latest("mine", "export", kept.key)
    run(do="prune")
    assert keys(store) == {2}


def test_what_is_being_read_or_built_stays(
    store: StepCache, capsys: pytest.CaptureFixture[str]
) -> None:
    read, built = put(store, 1, age_days=9), put(store, 2, age_days=9)
    with StepCache(store.root).using([read]), StepCache(store.root).locked("export", built.key):
        run(do="prune", older_than="1d")
    assert keys(store) == {1, 2}
    assert capsys.readouterr().err.count("kept: it is in use") == 2
    run(do="prune", older_than="1d")
    assert keys(store) == set()


def test_verify_finds_what_is_damaged_and_removes_it(
    store: StepCache, capsys: pytest.CaptureFixture[str]
) -> None:
    put(store, 1)
    damaged = put(store, 2)
    (damaged.path / "file").write_bytes(b"?" * 1000)
    run(do="verify")
    assert keys(store) == {1}
    assert "file: sha256" in capsys.readouterr().err


def test_unfinished_work_of_the_dead_is_swept_away_and_that_of_the_living_is_not(
    store: StepCache,
) -> None:
    dead = store.root / "building" / f"export-{'a' * 40}-0123456789ab"
    living = store.root / "building" / f"export-{'b' * 40}-0123456789ab"
    dead.mkdir(parents=True)
    with StepCache(store.root).locked("export", "b" * 40):
        living.mkdir()
        run()
        assert not dead.exists()
        assert living.exists()


def side_output(store: StepCache, number: int, content: str) -> Entry:
    """A measurement, as `evaluate` keeps it: no profile's last output, of a model by its hash."""
    key = f"{number:040x}"
    origin = {"parts": {"content": content, "sets": {"a": "b"}}, "time": time.time()}
    with store.locked("measure", key), store.building("measure", key, origin) as out:
        (out / "metrics.json").write_text("{}")
    entry = store.find("measure", key)
    assert entry is not None
    return entry


def test_a_preview_removes_nothing(store: StepCache, capsys: pytest.CaptureFixture[str]) -> None:
    put(store, 1, age_days=40)
    held = download(store, "old", 10, age_days=40)
    run(do="prune", dry_run="true")
    captured = capsys.readouterr()
    assert captured.err.count("would be removed") == 2
    assert "status=preview" in captured.out
    assert "removed=1" in captured.out
    assert keys(store) == {1}
    assert held.exists()


def test_what_the_last_run_needs_stays_whatever_the_limits(
    store: StepCache, capsys: pytest.CaptureFixture[str]
) -> None:
    last, old = put(store, 1, age_days=40), put(store, 2, age_days=40)
    store.set_latest("mine", "export", last.key)
    side_output(store, 3, last.manifest.digest)
    side_output(store, 4, old.manifest.digest)
    run(do="prune", older_than="30d")
    assert keys(store) == {1, 3, 4}
    run(do="prune")
    assert keys(store) == {1, 3}
    run(do="prune", max_size="0MB")
    assert keys(store) == {1, 3}
    assert "MB stay: a profile's last run" in capsys.readouterr().err


def test_what_a_champion_was_made_from_and_measured_with_stays(
    store: StepCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "registered_contents", lambda: {"c" * 64, "a" * 64})
    for number, about in ((1, {"artifact_sha256": "a" * 64}), (2, {"artifact_sha256": "b" * 64})):
        key = f"{number:040x}"
        origin = {"parts": {}, "time": time.time()}
        with store.locked("export", key), store.building("export", key, origin) as out:
            write_provenance(out, about)
    side_output(store, 3, "a" * 64)
    side_output(store, 4, "b" * 64)
    run(do="prune")
    assert keys(store) == {1, 3}
