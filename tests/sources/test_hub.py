"""Fetching from the hub when nothing is wrong, and what a fetch does between two attempts."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from phi3_mlflow.core.errors import CheckpointRefused, ProjectError, UserError
from phi3_mlflow.sources.common import empty
from phi3_mlflow.sources.fetch import resolve_revision, write_lock
from phi3_mlflow.sources.spec import parse_source
from tests.sources.faults import SHARD, TOKEN, Scene, cut, expected_files, status
from tests.sources.hub_server import COMMIT, REPO, HubServer
from tests.sources.raw_checkpoint import tiny_checkpoint

ROOT = Path(__file__).parents[2]


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer(tiny_checkpoint()) as running:
        yield running


@pytest.fixture
def scene(server: HubServer, tmp_path: Path) -> Scene:
    return Scene(server, tmp_path)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_only_what_is_needed_comes_down(scene: Scene) -> None:
    wanted = expected_files(scene.server)
    scene.server.files |= {
        "README.md": b"# a model",
        "modeling_phi3.py": b"import os",
        "pytorch_model.bin": b"\x80\x04",
        "onnx/model.onnx": b"graph",
        "consolidated.safetensors.md5": b"0",
        "LICENSE.py": b"import os",
        ".gitattributes": b"*.safetensors filter=lfs",
    }
    fetched = scene.fetch()
    assert contents(scene.out) == wanted
    asked = {request.name for request in scene.server.asked("resolve")}
    assert asked == set(wanted)
    assert fetched.revision == COMMIT
    assert fetched.source == f"hf:{REPO}@{COMMIT}"
    assert fetched.bytes_downloaded == sum(map(len, wanted.values()))
    assert fetched.lock == {n: hashlib.sha256(b).hexdigest() for n, b in wanted.items()}
    assert not list(scene.place.iterdir())


def test_one_file_of_weights_without_an_index(tmp_path: Path) -> None:
    with HubServer(tiny_checkpoint(shards=1)) as server:
        scene = Scene(server, tmp_path)
        scene.fetch()
        assert contents(scene.out) == server.files


def test_two_files_of_the_same_content(scene: Scene) -> None:
    scene.server.files["NOTICE"] = scene.server.files["LICENSE"]
    scene.fetch()
    assert contents(scene.out) == scene.server.files


def test_a_branch_is_resolved_to_the_commit(scene: Scene) -> None:
    scene.source = f"hf:{REPO}@main"
    fetched = scene.fetch()
    assert fetched.revision == COMMIT
    commits = {request.path.split("/")[4] for request in scene.server.asked("resolve")}
    assert commits == {COMMIT}, "a branch may move between two files"
    assert (
        yaml.safe_load(write_lock(fetched.source, fetched.revision, fetched.lock))["source"]
        == f"hf:{REPO}@{COMMIT}"
    )


def test_resolving_asks_only_when_it_must(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert resolve_revision(parse_source(f"hf:{REPO}@{COMMIT}")) == COMMIT
    assert not server.requests
    assert resolve_revision(parse_source(f"hf:{REPO}@main")) == COMMIT
    assert len(server.requests) == 1
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="Pin the commit"):
        resolve_revision(parse_source(f"hf:{REPO}@main"))


def test_a_written_lock_is_taken_back(scene: Scene) -> None:
    first = scene.fetch()
    lock = yaml.safe_load(write_lock(first.source, first.revision, first.lock))
    empty(scene.out)
    scene.lock, scene.source = lock["sha256"], lock["source"]
    scene.fetch()
    assert contents(scene.out) == scene.server.files


def test_the_token_goes_to_the_hub_and_nowhere_else(scene: Scene) -> None:
    scene.server.token = TOKEN
    scene.fetch()
    hub = [request for request in scene.server.requests if request.server == "hub"]
    store = [request for request in scene.server.requests if request.server == "store"]
    assert all(request.headers["authorization"] == f"Bearer {TOKEN}" for request in hub)
    assert store
    assert not any("authorization" in request.headers for request in store)


def test_retry_after_is_waited_for(scene: Scene) -> None:
    scene.server.fault(status(429, Retry_After="3"), times=2)
    scene.fetch()
    assert scene.waits == [3.0, 3.0]


def test_waits_double_and_end(scene: Scene) -> None:
    scene.time_limit_s = None
    scene.server.fault(status(503), route="api", times=10_000)
    with pytest.raises(ProjectError, match="given up after 6 attempts"):
        scene.fetch()
    assert len(scene.waits) == 5
    for wait, full in zip(scene.waits, (1, 2, 4, 8, 16), strict=True):
        assert full / 2 <= wait <= full


def test_a_cut_download_goes_on_where_it_was(scene: Scene) -> None:
    scene.server.fault(cut(100_000), name=SHARD)
    fetched = scene.fetch()
    asked = [r.headers.get("range") for r in scene.server.asked("lfs", SHARD)]
    assert asked == [None, "bytes=100000-"]
    assert fetched.bytes_downloaded == sum(map(len, scene.server.files.values()))


def test_a_second_fetch_goes_on_where_the_first_ended(scene: Scene) -> None:
    scene.server.fault(cut(100_000), name=SHARD)
    scene.server.fault(status(404), name=SHARD)
    with pytest.raises(ProjectError):
        scene.fetch()
    assert not list(scene.out.iterdir())
    scene.server.requests.clear()
    fetched = scene.fetch()
    asked = [(r.name, r.headers.get("range")) for r in scene.server.asked("lfs")]
    other = SHARD.replace("00001-", "00002-")
    assert asked == [(SHARD, "bytes=100000-"), (other, None)]
    assert not [r for r in scene.server.asked("resolve") if r.name == "config.json"]
    sizes = {name: len(content) for name, content in scene.server.files.items()}
    assert fetched.bytes_downloaded == sizes[SHARD] - 100_000 + sizes[other]
    assert contents(scene.out) == scene.server.files


FETCH = """
import contextlib, sys
from pathlib import Path
from phi3_mlflow.sources.fetch import fetch_source
from phi3_mlflow.sources.spec import parse_source
root = Path(sys.argv[1])
(root / sys.argv[3]).mkdir()
@contextlib.contextmanager
def progress(*_):
    class Bar:
        def advance(self, n): pass
    yield Bar()
fetch_source(parse_source(sys.argv[2]), root / sys.argv[3], sha256={}, base_dir=root,
             downloads=root / "downloads", progress=progress)
"""


def start_fetch(scene: Scene, out: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "HF_ENDPOINT": scene.server.url, "PYTHONPATH": str(ROOT)}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-c", FETCH, str(scene.root), scene.source, out]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)


def test_a_killed_fetch_is_gone_on_with(scene: Scene) -> None:
    # The first half comes at once, then nothing: killed in the middle.
    scene.server.files = tiny_checkpoint(intermediate_size=8192)
    half = len(scene.server.files[SHARD]) // 2

    def half_then_silence(reply: Any, _: Any) -> None:
        reply.headers["Content-Length"] = str(len(reply.body))
        reply.body, reply.linger_s = reply.body[:half], 30.0

    scene.server.fault(half_then_silence, name=SHARD)
    first = start_fetch(scene, "first")
    part = scene.part(SHARD)
    for _ in range(1000):
        if part.exists() and part.stat().st_size > 1_000_000:
            break
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    assert not list((scene.root / "first").iterdir())
    standing = part.stat().st_size
    assert standing > 1_000_000
    second = start_fetch(scene, "second")
    assert second.wait(60) == 0, second.stderr.read().decode() if second.stderr else ""
    assert contents(scene.root / "second") == scene.server.files
    ranges = [r.headers.get("range") for r in scene.server.asked("lfs", SHARD)]
    assert ranges == [None, f"bytes={standing}-"]


def test_two_processes_fetch_the_same_at_once(scene: Scene) -> None:
    running = [start_fetch(scene, name) for name in ("one", "two")]
    for process in running:
        assert process.wait(60) == 0, process.stderr.read().decode() if process.stderr else ""
    for name in ("one", "two"):
        assert contents(scene.root / name) == scene.server.files


def test_two_threads_fetch_the_same_at_once(scene: Scene, tmp_path: Path) -> None:
    scenes = [scene, Scene(scene.server, tmp_path / "other")]
    (tmp_path / "other" / "downloads").rmdir()
    (tmp_path / "other" / "downloads").symlink_to(scene.downloads)
    threads = [threading.Thread(target=one.fetch) for one in scenes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", scene.server.url)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for one in scenes:
        assert contents(one.out) == scene.server.files


def test_offline_ends_with_what_is_there(scene: Scene) -> None:
    # Everything came down; then the output could not be written.
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("phi3_mlflow.sources.partial.move_into", fail)
        with pytest.raises(ProjectError, match="No space left"):
            scene.fetch()
    scene.server.requests.clear()
    scene.environment = {"HF_HUB_OFFLINE": "1"}
    assert scene.fetch().bytes_downloaded == 0
    assert contents(scene.out) == scene.server.files
    assert not scene.server.requests


def test_offline_names_what_is_missing(scene: Scene) -> None:
    scene.server.fault(status(404), name=SHARD)
    with pytest.raises(ProjectError):
        scene.fetch()
    scene.server.requests.clear()
    scene.environment = {"HF_HUB_OFFLINE": "1"}
    with pytest.raises(ProjectError, match=rf"{SHARD}.*HF_HUB_OFFLINE forbids"):
        scene.fetch()
    assert not scene.server.requests


AUTO_MAP = {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}


def test_remote_code_is_refused_before_the_weights_come(scene: Scene) -> None:
    config = json.loads(scene.server.files["config.json"]) | {"auto_map": AUTO_MAP}
    scene.server.files["config.json"] = json.dumps(config).encode()
    with pytest.raises(CheckpointRefused, match="remote_code: drop"):
        scene.fetch()
    assert not scene.server.asked("lfs")


def test_references_to_code_are_dropped_on_request(scene: Scene) -> None:
    config = json.loads(scene.server.files["config.json"])
    original = json.dumps(config | {"auto_map": AUTO_MAP}).encode()
    scene.server.files |= {"config.json": original, "modeling_phi3.py": b"import os"}
    scene.remote_code = "drop"
    fetched = scene.fetch()
    written = (scene.out / "config.json").read_bytes()
    assert json.loads(written) == config
    assert not (scene.out / "modeling_phi3.py").exists()
    assert fetched.files["config.json"] == (len(written), hashlib.sha256(written).hexdigest())
    assert fetched.lock["config.json"] == hashlib.sha256(original).hexdigest()
    assert fetched.changes == ("config.json: took out auto_map, which led to code",)


def test_the_server_speaks_the_hubs_api(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """huggingface_hub itself gets the same files from it, so it is a fair stand-in."""
    from huggingface_hub import HfApi, constants, snapshot_download

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    directory = snapshot_download(
        REPO, revision=COMMIT, endpoint=server.url, cache_dir=tmp_path, token=False
    )
    assert contents(Path(directory)) == server.files
    tree = {entry.path: entry for entry in HfApi(server.url, token=False).list_repo_tree(REPO)}
    assert set(tree) == set(server.files)
    assert tree[SHARD].lfs.sha256 == hashlib.sha256(server.files[SHARD]).hexdigest()
