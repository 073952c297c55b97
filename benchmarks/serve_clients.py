"""Several clients at once: the project's server, `mlflow models serve` and llama_cpp.server.

    python benchmarks/serve_clients.py --onnx DIR
    python benchmarks/serve_clients.py --onnx DIR --llama-python VENV/bin/python --gguf FILE

Each client asks one question after the other and reads the answer as a stream, where there is
one; `mlflow models serve` has none, so there the first text comes with the last. All servers run
on the same cores as the clients. llama-cpp-python is used from an environment of its own; give it a
file of about the same size as the ONNX model's for a fair comparison.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from _result import write_result
from serve_common import Served, ours, registered, server

CLIENTS = (1, 2, 4, 8)
TOPICS = (
    "a river", "a lighthouse", "the winter", "an old clock", "two brothers", "a lost key",
    "the night train", "a garden", "the sea", "a teacher", "a broken bridge", "a long letter",
)  # fmt: skip


@dataclass
class Answer:
    """One answer: seconds to its first text, and its tokens."""

    first_s: float
    tokens: int


async def ask_streamed(client: httpx.AsyncClient, body: dict[str, Any]) -> Answer:
    # Pieces are counted: llama_cpp.server breaks a stream off that asks for the usage. Both servers
    # send a piece a token, but for the token that ends the turn.
    began, first, pieces = time.perf_counter(), 0.0, 0
    body = {**body, "stream": True}
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if event["choices"] and event["choices"][0]["delta"].get("content"):
                pieces += 1
                first = first or time.perf_counter() - began
    return Answer(first, pieces)


async def ask_whole(client: httpx.AsyncClient, body: dict[str, Any]) -> Answer:
    began = time.perf_counter()
    answer = await client.post("/invocations", json=body)
    answer.raise_for_status()
    tokens = answer.json()["usage"]["completion_tokens"]
    return Answer(time.perf_counter() - began, tokens)


async def measure(
    url: str, clients: int, requests: int, tokens: int, streamed: bool
) -> tuple[list[Answer], float]:
    """All answers, and the seconds they took together."""
    ask = ask_streamed if streamed else ask_whole
    limits = httpx.Limits(max_connections=clients)

    async def one(client: httpx.AsyncClient, number: int) -> list[Answer]:
        found = []
        for turn in range(requests):
            topic = TOPICS[(number * requests + turn) % len(TOPICS)]
            text = f"Tell me a long story about {topic}, number {clients}-{number}-{turn}."
            body = {"messages": [{"role": "user", "content": text}], "max_tokens": tokens}
            found.append(await ask(client, body))
        return found

    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        await ask(client, {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 4})
        began = time.perf_counter()
        answers = await asyncio.gather(*(one(client, number) for number in range(clients)))
        return [answer for some in answers for answer in some], time.perf_counter() - began


def rows_of(
    name: str, served: Served, arguments: argparse.Namespace, streamed: bool
) -> list[list[Any]]:
    rows: list[list[Any]] = []
    for clients in CLIENTS:
        answers, seconds = asyncio.run(
            measure(served.url, clients, arguments.requests, arguments.tokens, streamed)
        )
        firsts = sorted(answer.first_s for answer in answers)
        tokens = sum(answer.tokens for answer in answers)
        p95 = firsts[min(len(firsts) - 1, int(0.95 * len(firsts)))]
        row = [name, clients, tokens / seconds, statistics.median(firsts), p95, tokens]
        rows.append(row)
        print(*row, file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--onnx", type=Path, required=True, help="what the export step made")
    parser.add_argument("--requests", type=int, default=3, help="of each client")
    parser.add_argument("--tokens", type=int, default=48, help="of an answer")
    parser.add_argument("--llama-python", type=Path, help="a Python that has llama-cpp-python")
    parser.add_argument("--gguf", type=Path, help="the model for it")
    parser.add_argument("--only-ours", action="store_true", help="no other server")
    arguments = parser.parse_args()
    if (arguments.llama_python is None) != (arguments.gguf is None):
        parser.error("--llama-python and --gguf belong together")
    rows: list[list[Any]] = []
    with registered(arguments.onnx) as environment:
        with server(ours("--running", "8"), environment, "/ping") as served:
            rows += rows_of("serve (this project)", served, arguments, True)
        with server(ours("--running", "8", "--batch", "1"), environment, "/ping") as served:
            rows += rows_of("serve, in turns (batch=1)", served, arguments, True)
        if not arguments.only_ours:
            command = ["mlflow", "models", "serve", "-m", "models:/served@champion", "-p", "{port}"]
            command += ["--env-manager", "local"]
            with server(command, environment, "/ping") as served:
                rows += rows_of("mlflow models serve", served, arguments, False)
        if arguments.gguf is not None:
            command = [str(arguments.llama_python), "-m", "llama_cpp.server", "--port", "{port}"]
            command += ["--model", str(arguments.gguf), "--n_ctx", "2048"]
            threads = str(len(os.sched_getaffinity(0)))  # left alone, it takes half of them
            command += ["--n_threads", threads, "--n_threads_batch", threads]
            command += ["--interrupt_requests", "false"]
            with server(command, environment, "/v1/models") as served:
                rows += rows_of("llama_cpp.server", served, arguments, True)
    notes = (
        "tokens/s is of all clients together, first texts are counted from the request. Greedy; no "
        "two questions alike. `mlflow models serve` does not stream: its first text is the whole."
    )
    if arguments.gguf is not None:
        notes += (
            " llama_cpp.server has as many threads, and a file of "
            f"{arguments.gguf.stat().st_size / 1e6:.0f} MB ({arguments.gguf.stem})."
        )
    write_result(
        "serve_clients",
        f"Clients at once, {arguments.requests} answers of {arguments.tokens} tokens each",
        ["server", "clients", "tokens/s", "first text, median s", "first text, p95 s", "tokens"],
        rows,
        notes,
    )


if __name__ == "__main__":
    main()
