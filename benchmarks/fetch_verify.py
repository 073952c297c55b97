"""What it costs that everything fetched is checked: time against a plain copy of the same bytes.

    python benchmarks/fetch_verify.py                      # a checkpoint of 0.67 GB, random weights
    python benchmarks/fetch_verify.py --checkpoint DIR     # one of yours
    python benchmarks/fetch_verify.py --rounds 9 --no-result

`hf:` is compared with a plain download of the same files by the same HTTP client, from a local hub
in a process of its own, once at the speed of a fast network and once as fast as it goes; `file:`
with `shutil.copyfile`, until the bytes are on the disk and only into the page cache. In the last
pair nothing but memory is in the way, so it shows how fast SHA-256 is and not what a fetch costs.
The ways take turns and the best round of each counts, so that what else the machine does weighs on
all alike. The source is in the page cache before.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from _result import write_result  # noqa: E402

from phi3_mlflow.checkpoints.configuration import expected_shapes  # noqa: E402
from phi3_mlflow.sources.common import empty  # noqa: E402
from phi3_mlflow.sources.fetch import fetch_source  # noqa: E402
from phi3_mlflow.sources.spec import parse_source  # noqa: E402
from tests.sources.hub_server import COMMIT, REPO, HubServer  # noqa: E402
from tests.sources.raw_checkpoint import tiny_config, tiny_tokenizer  # noqa: E402

_SIZES = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 32064,
}
_GIGABIT = 125e6  # bytes per second


def write_checkpoint(directory: Path) -> None:
    """Random bytes in the shapes of a Phi-3 of 0.33 billion parameters, as BF16."""
    config = tiny_config(**_SIZES)
    header: dict[str, object] = {}
    position = 0
    for name, shape in expected_shapes(config)[0].items():
        count = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        offsets = [position, position + count]
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": offsets}
        position += count
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text(json.dumps(tiny_tokenizer(32011)))
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        while position:
            piece = min(position, 1 << 24)
            file.write(os.urandom(piece))
            position -= piece


class _Silent:
    def advance(self, amount: int, /) -> None:
        """Show nothing."""


@contextlib.contextmanager
def _progress(*_: object) -> Iterator[_Silent]:
    yield _Silent()


def fetch(source: str, work: Path) -> None:
    """Fetch into `work/out`, as the step does."""
    fetch_source(
        parse_source(source),
        work / "out",
        sha256={},
        base_dir=work,
        downloads=work / "downloads",
        progress=_progress,
    )


def plain_copy(checkpoint: Path, work: Path) -> None:
    """The same files by shutil."""
    for file in checkpoint.iterdir():
        shutil.copyfile(file, work / "out" / file.name)


def to_disk(out: Path) -> None:
    """Wait until what was written is on the disk."""
    for file in out.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())


def plain_download(url: str, names: list[str], work: Path) -> None:
    """The same files by the same HTTP client, unchecked."""
    import httpx

    with httpx.Client(follow_redirects=True) as client:
        for name in names:
            address = f"{url}/{REPO}/resolve/{COMMIT}/{name}"
            with client.stream("GET", address) as response, (work / "out" / name).open("wb") as out:
                for chunk in response.iter_bytes():
                    out.write(chunk)


def serve(checkpoint: Path, rate: float, pipe: Connection) -> None:
    """A hub with these files, at so many bytes per second, until the other side hangs up."""
    files = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    with HubServer(files) as server:
        for name in files:
            server.sha256(name)
        if rate:
            server.fault(lambda reply, _: setattr(reply, "rate", rate), times=10**9)
        pipe.send(server.url)
        with contextlib.suppress(EOFError):
            pipe.recv()


@contextlib.contextmanager
def hub(checkpoint: Path, rate: float = 0.0) -> Iterator[str]:
    """The address of a hub in a process of its own."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(checkpoint, rate, there), daemon=True)
    process.start()
    try:
        yield here.recv()
    finally:
        here.close()
        process.terminate()
        process.join()


def measure(ways: dict[str, Callable[[], None]], rounds: int, out: Path) -> dict[str, list[float]]:
    """Seconds of every round, by way; the ways take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            empty(out)
            started = time.perf_counter()
            way()
            taken = time.perf_counter() - started
            if number:  # the first round warms caches and imports
                seconds[name].append(taken)
                print(f"  round {number}: {name}: {taken:.2f} s", flush=True)
    return seconds


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint directory; default: made")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, help="where to write; default: a temporary directory")
    parser.add_argument("--no-result", action="store_true", help="print only")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fetch-verify-", dir=options.work) as name:
        work = Path(name)
        for folder in ("out", "downloads", "made"):
            (work / folder).mkdir()
        checkpoint = options.checkpoint or work / "made"
        if options.checkpoint is None:
            write_checkpoint(checkpoint)
        report(checkpoint.absolute(), work, options.rounds, options.no_result)


def all_of(*steps: Callable[[], None]) -> Callable[[], None]:
    """One step after the other, as one."""

    def run() -> None:
        for step in steps:
            step()

    return run


def report(checkpoint: Path, work: Path, rounds: int, no_result: bool) -> None:
    """Measure all ways with one checkpoint."""
    names = sorted(file.name for file in checkpoint.iterdir())
    size = sum((checkpoint / name).stat().st_size for name in names)
    out, load = work / "out", os.getloadavg()[0]
    os.environ.pop("HF_HUB_OFFLINE", None)

    def fetch_hub(url: str) -> None:
        os.environ["HF_ENDPOINT"] = url
        fetch(f"hf:{REPO}@{COMMIT}", work)

    def from_hub(url: str) -> list[Callable[[], None]]:
        return [partial(plain_download, url, names, work), partial(fetch_hub, url)]

    from_file = [partial(plain_copy, checkpoint, work), partial(fetch, f"file:{checkpoint}", work)]
    with hub(checkpoint, _GIGABIT) as slow, hub(checkpoint) as fast:
        pairs = {
            "hf:, server at 1 Gbit/s": from_hub(slow),
            "hf:, server as fast as it goes": from_hub(fast),
            "file:, until it is on the disk": [all_of(w, partial(to_disk, out)) for w in from_file],
            "file:, into the page cache": from_file,
        }
        ways = {
            f"{name}, {kind}": way
            for name, both in pairs.items()
            for kind, way in zip(("plain", "checked"), both, strict=True)
        }
        seconds = measure(ways, rounds, out)
    rows: list[list[str | float]] = []
    for name in pairs:
        plain, checked = (min(seconds[f"{name}, {kind}"]) for kind in ("plain", "checked"))
        rows.append([name, plain, checked, size / checked / 1e9, checked / plain])
    columns = ["fetch", "plain copy, s", "checked, s", "checked, GB/s", "ratio"]
    if no_result:
        for row in rows:
            print(*row)
        return
    loads = f"{load:.1f} and {os.getloadavg()[0]:.1f}"
    write_result(
        "fetch_verify",
        f"Cost of checking what is fetched: {size / 1e9:.2f} GB, sha256, headers and shapes",
        columns,
        rows,
        notes=f"Best of {rounds} rounds, the ways taking turns; the source is in the page cache. "
        "Digests are computed in a thread of their own: they cost time where the bytes come faster "
        f"than one core makes SHA-256. Load average before and after: {loads}.",
        extra={"seconds": seconds, "bytes": size},
    )


if __name__ == "__main__":
    main()
