"""Bytes written while logging the ONNX flavor, as a multiple of the model's size.

    python benchmarks/chat_logging.py --onnx DIR

Written to files: `wchar` of /proc/self/io, which counts copies within the kernel too (Linux).
Sent to a server: the bodies of PUT and POST requests, to an `mlflow server` that stores artifacts.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _result import write_result
from chat_common import arguments, store


def written() -> int:
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return int(dict(line.split(": ") for line in lines)["wchar"])


def plain(onnx_dir: Path) -> None:
    """The way of MLflow's documentation: the directory as an artifact of a pyfunc."""
    import mlflow

    from phi3_mlflow.flavors import bundle

    mlflow.pyfunc.log_model(
        name="plain",
        python_model=bundle.code_file("chat"),
        artifacts={"onnx": str(onnx_dir)},
        signature=bundle.signature("chat"),
        pip_requirements=bundle.requirements("onnx"),
    )


def ours(onnx_dir: Path) -> None:
    from phi3_mlflow.flavors.onnx import log_onnx

    log_onnx(onnx_dir, name="ours")


def sent_by(log: Callable[[Path], None], onnx_dir: Path) -> tuple[int, int]:
    """Bytes sent and requests with the largest file, while logging to the tracking server."""
    import requests

    largest = max(file.stat().st_size for file in onnx_dir.iterdir())
    sizes: list[int] = []
    send = requests.Session.send

    def counted(self: Any, request: Any, **more: Any) -> Any:
        size = request.headers.get("Content-Length")
        body = request.body
        if size is None and hasattr(body, "fileno"):
            size = os.fstat(body.fileno()).st_size
        sizes.append(int(size or 0))
        return send(self, request, **more)

    requests.Session.send = counted  # type: ignore[method-assign]
    try:
        log(onnx_dir)
    finally:
        requests.Session.send = send  # type: ignore[method-assign]
    return sum(sizes), sum(size >= largest for size in sizes)


class Server:
    """An `mlflow server` with artifacts, in a temporary folder."""

    def __enter__(self) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._folder = tempfile.TemporaryDirectory()
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
        command += ["--backend-store-uri", "sqlite:///server.db", "--serve-artifacts"]
        command += ["--artifacts-destination", "./stored"]
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self._process = subprocess.Popen(
            command,
            cwd=self._folder.name,
            env={**os.environ, "PATH": path},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        url = f"http://127.0.0.1:{port}"
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
                return url
            except OSError:
                time.sleep(0.3)
        raise TimeoutError("mlflow server did not start")

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(30)
        self._folder.cleanup()


def main() -> None:
    options = arguments(__doc__ or "", "onnx")
    import mlflow

    size = sum(file.stat().st_size for file in options.onnx.rglob("*") if file.is_file())
    rows, raw = [], {}
    ways = {"pyfunc.log_model(artifacts=...)": plain, "log_onnx": ours}
    with store():
        for name, log in ways.items():
            before, started = written(), time.perf_counter()
            log(options.onnx)
            raw[name] = {"files": written() - before, "seconds": time.perf_counter() - started}
    with Server() as url:
        mlflow.set_tracking_uri(url)
        mlflow.set_experiment("bench")
        for name, log in ways.items():
            before = written()
            sent, uploads = sent_by(log, options.onnx)
            raw[name].update(sent=sent, uploads=uploads, files_beside=written() - before)
    for name, found in raw.items():
        rows.append(
            [
                name,
                found["files"] / size,
                found["seconds"],
                found["sent"] / size,
                found["files_beside"] / size,
                found["uploads"],
            ]
        )
    write_result(
        "chat_logging",
        "Bytes written while logging, as a multiple of the model's size",
        ["way", "to a local store", "seconds", "sent to a server", "to disk beside", "uploads"],
        rows,
        notes=f"A model of {size / 1e6:,.1f} MB. Uploads: requests that carry the weights.",
        extra={"model_bytes": size, **raw},
    )


if __name__ == "__main__":
    main()
