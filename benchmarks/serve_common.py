"""What the server benchmarks share: a model in a store of its own, and servers over it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chat_common import store

ROOT = Path(__file__).resolve().parents[1]
MODEL = "served"


@dataclass(frozen=True)
class Served:
    """A server that answers; `process` is the one that was started."""

    url: str
    process: subprocess.Popen[bytes]


@contextlib.contextmanager
def registered(onnx: Path, **model_config: Any) -> Iterator[dict[str, str]]:
    """Log and register an exported model; gives the environment in which servers find it."""
    import mlflow

    from phi3_mlflow.flavors.onnx import log_onnx

    with store():
        logged = log_onnx(onnx, name=MODEL, model_config=model_config)
        mlflow.register_model(logged.model_uri, MODEL)
        mlflow.MlflowClient().set_registered_model_alias(MODEL, "champion", "1")
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
        yield environment | {
            "PATH": path, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": mlflow.get_tracking_uri(),
        }  # fmt: skip


@contextlib.contextmanager
def server(
    command: Sequence[str], environment: dict[str, str], ping: str, wait_s: float = 120
) -> Iterator[Served]:
    """Run a server; `{port}` in the command becomes a free one. Ends it with SIGTERM."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [part.format(port=port) for part in command], env=environment, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        end = time.monotonic() + wait_s
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(url + ping, timeout=5)
                break
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"this server did not come up: {' '.join(command)}")
            time.sleep(0.2)
        yield Served(url, process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def ours(*options: str) -> list[str]:
    """The command of the project's own server."""
    uri = f"models:/{MODEL}@champion"
    return [sys.executable, "-m", "steps.serve", "--model-uri", uri, "--port", "{port}", *options]
