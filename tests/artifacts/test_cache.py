from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3_mlflow.artifacts.cache import StepCache, cache_root, key_of
from phi3_mlflow.core.errors import EnvironmentProblem

KEY = "0" * 40
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> StepCache:
    return StepCache(tmp_path / "cache")


def put(store: StepCache, content: str = "content", key: str = KEY) -> None:
    with store.locked("quantize", key), store.building("quantize", key, {"parts": {}}) as out:
        (out / "file").write_text(content)


def fail_while_building(store: StepCache, error: Exception) -> None:
    with store.locked("quantize", KEY), store.building("quantize", KEY, {}) as out:
        (out / "half").write_text("x")
        raise error


def test_what_was_built_is_found_with_its_manifest_and_origin(store: StepCache) -> None:
    assert store.find("quantize", KEY) is None
    put(store)
    entry = store.find("quantize", KEY)
    assert entry is not None
    assert (entry.path / "file").read_text() == "content"
    assert entry.manifest.total_bytes == 7
    assert entry.origin == {"parts": {}}
    assert store.holding(entry.path) == entry
    assert store.holding(entry.path.parent) is None
    assert store.holding(Path("/")) is None


def test_a_damaged_output_is_no_hit_and_is_removed(store: StepCache) -> None:
    put(store)
    entry = store.find("quantize", KEY)
    assert entry is not None
    stat = (entry.path / "file").stat()
    (entry.path / "file").write_text("CONTENT")
    os.utime(entry.path / "file", ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the trace wiped
    assert store.find("quantize", KEY) is None
    assert not entry.path.exists()


@pytest.mark.parametrize("lost", ["output/file", "output/manifest.json", "origin.json"])
def test_an_output_with_a_part_missing_is_no_hit(store: StepCache, lost: str) -> None:
    put(store)
    (store.root / "outputs/quantize" / KEY / lost).unlink()
    assert store.find("quantize", KEY) is None


def test_a_touched_but_equal_output_is_still_a_hit(store: StepCache) -> None:
    put(store)
    file = store.root / "outputs/quantize" / KEY / "output/file"
    os.utime(file)
    assert store.find("quantize", KEY) is not None


def test_work_that_fails_leaves_nothing(store: StepCache) -> None:
    with pytest.raises(RuntimeError):
        fail_while_building(store, RuntimeError())
    assert store.find("quantize", KEY) is None
    assert list((store.root / "building").iterdir()) == []


def test_debris_of_a_killed_process_is_removed_under_the_lock(store: StepCache) -> None:
    debris = store.root / "building" / f"quantize-{KEY}-killed"
    others = store.root / "building" / f"export-{KEY}-at-work"
    for folder in (debris, others):
        folder.mkdir(parents=True)
    with store.locked("quantize", KEY):
        assert not debris.exists()
        assert others.exists()


def test_a_full_disk_is_a_clear_message_and_leaves_nothing(store: StepCache) -> None:
    with pytest.raises(EnvironmentProblem, match="no space left"):
        fail_while_building(store, OSError(errno.ENOSPC, "No space left on device"))
    assert list((store.root / "building").iterdir()) == []


def test_doing_it_again_replaces_the_output(store: StepCache) -> None:
    put(store, "old")
    put(store, "new")
    entry = store.find("quantize", KEY)
    assert entry is not None
    assert (entry.path / "file").read_text() == "new"


def test_one_at_a_time_builds_a_key(store: StepCache) -> None:
    inside: list[int] = []
    most = []

    def build() -> None:
        with StepCache(store.root).locked("quantize", KEY):
            inside.append(1)
            most.append(len(inside))
            put_now = threading.Event()
            put_now.wait(0.01)
            inside.pop()

    threads = [threading.Thread(target=build) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 8


def test_latest_is_remembered_by_profile(store: StepCache) -> None:
    put(store)
    assert store.latest("p", "quantize") is None
    store.set_latest("p", "quantize", KEY)
    assert store.latest("p", "quantize") == store.find("quantize", KEY)
    assert store.latest("q", "quantize") is None


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHI3_MLFLOW_CACHE", "~/elsewhere")
    assert cache_root() == Path.home() / "elsewhere"
    monkeypatch.delenv("PHI3_MLFLOW_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_root() == Path("/xdg/phi3-mlflow")


@given(st.dictionaries(st.text(), json_values, max_size=4))
def test_a_key_does_not_depend_on_the_order_of_its_parts(parts: dict) -> None:
    assert key_of(parts) == key_of(dict(reversed(parts.items())))


@given(json_values, json_values)
def test_keys_differ_when_anything_differs_even_the_type(one, other) -> None:
    def typed(value):
        if isinstance(value, dict):
            return {k: typed(v) for k, v in value.items()}
        if isinstance(value, list):
            return [typed(v) for v in value]
        return type(value).__name__, repr(value)

    same = typed(one) == typed(other)
    assert (key_of({"v": one}) == key_of({"v": other})) == same


@pytest.mark.parametrize("pair", [(1, "1"), (1, True), (0, False), (1, 1.0), ("", None)])
def test_values_that_look_alike_are_told_apart(pair: tuple) -> None:
    assert key_of({"x": pair[0]}) != key_of({"x": pair[1]})


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError("16384 requested and 15872 written"),  # as numpy's tofile has it
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_known_in_every_guise(store: StepCache, error: Exception) -> None:
    wrapped = RuntimeError("the library's own")
    wrapped.__cause__ = error
    for each in (error, wrapped):
        with pytest.raises(EnvironmentProblem, match="no space left"):
            fail_while_building(store, each)


def test_another_error_is_not_taken_for_a_full_disk(store: StepCache) -> None:
    with pytest.raises(OSError, match="Input/output"):
        fail_while_building(store, OSError(errno.EIO, "Input/output error"))


def test_what_cannot_be_marked_as_used_is_still_whole(
    store: StepCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store)

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("phi3_mlflow.artifacts.cache.write_json", full)
    assert store.find("quantize", KEY) is not None


def test_too_many_open_files_do_not_cost_an_output(
    store: StepCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store)

    def exhausted(*arguments: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr("phi3_mlflow.artifacts.cache._stamps", exhausted)
        with pytest.raises(EnvironmentProblem, match="Too many open files"):
            store.find("quantize", KEY)
    assert store.find("quantize", KEY) is not None
