"""The entry point as a user starts it, over the real default model."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest
from click.testing import CliRunner

from phi3_mlflow.core.errors import EXIT_BAD_INPUT
from phi3_mlflow.pipeline.command_line import click_command
from phi3_mlflow.stages.serve import COMMAND
from tests.conftest import Workspace
from tests.server.conftest import wait_for

FRANCE: Any = [{"role": "user", "content": "What is the capital of France?"}]


def _invoke(*options: str) -> Any:
    return CliRunner().invoke(click_command(COMMAND), list(options))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--host", "0.0.0.0"), "PHI3_MLFLOW_API_KEY"),
        (("--port", "99999"), "port = '99999'"),
        (("--trace", "everything"), "allowed: off, figures, full"),
        (("--port", "0"), "the registry has no alias champion of a model smollm2-135m"),
        (("--model-uri", "models:/nobody/3", "--port", "0"), "no version 3 of a model nobody"),
    ],
)
def test_bad_input(
    options: tuple[str, ...], words: str, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PHI3_MLFLOW_API_KEY", raising=False)
    result = _invoke(*options)
    assert result.exit_code == EXIT_BAD_INPUT, result.output
    assert words in result.stderr
    assert "Traceback" not in result.stderr


@contextmanager
def _started(place: Workspace, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The entry point in a process of its own; its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "steps.serve", "--port", "0", *options], cwd=place.folder,
        env=place.whole_environment, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    lines: list[str] = []

    def read() -> None:
        assert process.stderr is not None
        lines.extend(iter(process.stderr.readline, ""))

    reader = threading.Thread(target=read, daemon=True)
    heard: list[str] = []
    try:
        assert process.stderr is not None
        while not heard:
            line = process.stderr.readline()
            assert line, "".join(lines)
            lines.append(line)
            heard = re.findall(r"(http://127\.0\.0\.1:\d+) ", line)
        reader.start()
        process.lines = lines  # type: ignore[attr-defined]
        yield process, heard[0]
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_the_champion_is_served_until_a_signal_and_to_the_end_of_its_answer(
    default_run: tuple[Workspace, str],
) -> None:
    with _started(default_run[0]) as (process, address):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0)
        (model,) = client.models.list()
        assert model.id == "smollm2-135m"
        raw = client.chat.completions.with_raw_response.create(
            model=model.id, messages=FRANCE, max_tokens=24
        )
        assert raw.headers["x-model-version"] == "1"
        assert "Paris" in (raw.parse().choices[0].message.content or "")
        stream = client.chat.completions.create(
            model=model.id, messages=[{"role": "user", "content": "Tell a long story."}],
            max_tokens=60, stream=True,
        )  # fmt: skip
        pieces = [next(stream)]
        process.send_signal(signal.SIGTERM)
        pieces += list(stream)
        assert pieces[-1].choices[0].finish_reason in ("length", "stop")
        assert len(pieces) > 30
        assert process.wait(60) == 0
        assert process.stdout is not None
        assert "step=serve status=done" in process.stdout.read()
        log = "".join(process.lines)  # type: ignore[attr-defined]
        wait_for(lambda: "/v1/chat/completions 200" in "".join(process.lines))  # type: ignore[attr-defined]
        assert "France" not in log
        assert "Paris" not in log
        assert "Traceback" not in log


@pytest.mark.slow
def test_a_port_that_is_taken_is_told(default_run: tuple[Workspace, str]) -> None:
    with _started(default_run[0]) as (_, address):
        port = address.rpartition(":")[2]
        result = default_run[0].step("serve", "--port", port)
        assert result.returncode == 1
        assert f"cannot listen on 127.0.0.1 port {port}" in result.stderr
        assert "Traceback" not in result.stderr
