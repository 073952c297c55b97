"""`mlflow models serve` and both flavors: the same requests, the same answers, the same errors."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import pytest

pytestmark = pytest.mark.slow

SPAIN = {"messages": [{"role": "user", "content": "What is the capital of Spain?"}]}


@contextmanager
def _served(info: Any, folder: Path) -> Iterator[str]:
    """Serve a model the way a user does; gives the server's address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model = mlflow.artifacts.download_artifacts(info.model_uri)
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", model]
    command += ["-p", str(port), "--env-manager", "local"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    # An activated environment: MLflow starts uvicorn by its name.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            for _ in range(600):
                if server.poll() is not None:
                    pytest.fail((folder / "server.log").read_text()[-3000:])
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5)
                    break
                except OSError:
                    time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/invocations"
        finally:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGTERM)
            server.wait(30)


def _post(url: str, body: dict[str, Any]) -> tuple[int, Any]:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


@pytest.mark.parametrize("flavor", ["onnx", "transformers"])
def test_a_served_chat_model(request: pytest.FixtureRequest, flavor: str, tmp_path: Path) -> None:
    local = request.getfixturevalue(f"{flavor}_model")
    with _served(request.getfixturevalue(f"{flavor}_info"), tmp_path) as url:
        status, answer = _post(url, {**SPAIN, "max_tokens": 6, "temperature": 0, "stop": ["zzz"]})
        assert status == 200
        assert answer["choices"] == local.predict({**SPAIN, "max_tokens": 6})["choices"]
        assert (answer["object"], answer["model"]) == ("chat.completion", "tiny")
        assert answer["usage"]["completion_tokens"] == 6
        sampled = {**SPAIN, "max_tokens": 6, "temperature": 1.5, "seed": 11}
        first, second = (_post(url, sampled)[1]["choices"] for _ in range(2))
        assert first == second, "a served request carries its seed like any other field"
        assert first != _post(url, {**sampled, "seed": 12})[1]["choices"]
        for bad, name in (
            ({**SPAIN, "max_tokens": 0}, "max_tokens: 0 is below 1"),
            ({"messages": []}, "messages: the list is empty"),
            ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role"),
        ):
            status, error = _post(url, bad)
            assert (status, error["error_code"]) == (400, "INVALID_PARAMETER_VALUE")
            assert name in error["message"]
        rows = {"dataframe_records": [{**SPAIN, "max_tokens": 2}, {**SPAIN, "max_tokens": 3}]}
        counted = [a["usage"]["completion_tokens"] for a in _post(url, rows)[1]["predictions"]]
        assert counted == [2, 3]


def test_a_served_prompt_model(prompt_info: Any, prompt_model: Any, tmp_path: Path) -> None:
    prompt = {"prompt": "<|user|>What is the capital of Spain?<|end|><|assistant|>"}
    with _served(prompt_info, tmp_path) as url:
        body = {"dataframe_records": [prompt], "params": {"max_tokens": 5}}
        status, answer = _post(url, body)
        assert status == 200
        assert answer["predictions"] == prompt_model.predict(prompt, params={"max_tokens": 5})
        status, answer = _post(url, {**prompt, "max_tokens": 5})
        assert (status, answer) == (200, prompt_model.predict(prompt, params={"max_tokens": 5}))
