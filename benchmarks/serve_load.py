"""Minutes of mixed requests, broken ones among them: what is lost, what is answered wrongly, and
how much memory the server has more at the end.

    python benchmarks/serve_load.py --onnx DIR --minutes 10

Good requests (streams, whole answers, completions, invocations, schemas), requests that must be
refused (bad JSON, wrong types, too long, too large, unknown models), and clients that hang up in
the middle. A request that meets a full queue (429) is sent again. Memory is resident memory of the
server, medians of a sixth of the time: after the first third (caches are filling until then) and
at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
from _result import write_result
from serve_common import MODEL, ours, registered, server

CHAT = "/v1/chat/completions"
CACHE_MB = 128


class Load:
    """Clients against one server, and what they saw."""

    def __init__(self, url: str, seed: int) -> None:
        self.url = url
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.lost: list[str] = []
        self.wrong: list[str] = []

    def chat(self, **more: Any) -> dict[str, Any]:
        number = self.random.randrange(10**6)
        words = " ".join(self.random.choices(("tell", "me", "of", "the", "sea"), k=number % 60))
        text = f"Story {number}: {words}"
        messages = [{"role": "user", "content": text}]
        return {"messages": messages, "max_tokens": self.random.randint(1, 24)} | more

    async def good_stream(self, client: httpx.AsyncClient) -> int:
        body = self.chat(stream=True, temperature=self.random.choice((0, 0.9)))
        async with client.stream("POST", CHAT, json=body) as answer:
            await answer.aread()
            if answer.status_code == 200 and not answer.text.endswith("data: [DONE]\n\n"):
                self.lost.append("a stream without its end")
            return answer.status_code

    async def good_whole(self, client: httpx.AsyncClient) -> int:
        answer = await client.post(CHAT, json=self.chat(n=self.random.randint(1, 2)))
        if answer.status_code == 200 and not answer.json()["choices"][0]["finish_reason"]:
            self.lost.append("an answer without an end")
        return answer.status_code

    async def good_completion(self, client: httpx.AsyncClient) -> int:
        body = {"prompt": "Once upon a time", "max_tokens": 8, "logprobs": 2, "model": MODEL}
        return (await client.post("/v1/completions", json=body)).status_code

    async def good_invocation(self, client: httpx.AsyncClient) -> int:
        return (await client.post("/invocations", json=self.chat())).status_code

    async def good_schema(self, client: httpx.AsyncClient) -> int:
        schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
        form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
        return (await client.post(CHAT, json=self.chat(response_format=form))).status_code

    async def hang_up(self, client: httpx.AsyncClient) -> int:
        body = self.chat(stream=True, max_tokens=200)
        async with client.stream("POST", CHAT, json=body) as answer:
            status = answer.status_code
            pieces = self.random.randint(0, 4)
            async for _ in answer.aiter_lines():
                if pieces == 0:
                    break
                pieces -= 1
        return status

    async def bad(self, client: httpx.AsyncClient, wanted: int, **send: Any) -> int:
        send.setdefault("headers", {"Content-Type": "application/json"})
        status = (await client.post(send.pop("path", CHAT), **send)).status_code
        return 0 if status == wanted else status

    def draw(self) -> tuple[str, Callable[[httpx.AsyncClient], Awaitable[int]], bool]:
        """A kind of request, how to send it, and whether it must be answered with 200."""
        long = {"messages": [{"role": "user", "content": "word " * 9000}]}
        bads: list[tuple[str, int, dict[str, Any]]] = [
            ("bad JSON", 400, {"content": b'{"messages": [}'}),
            ("wrong types", 400, {"json": {"messages": "hello", "n": "two"}}),
            ("too many tokens", 400, {"json": self.chat(max_tokens=10**6)}),
            ("prompt too long", 400, {"json": long}),
            ("too large", 413, {"content": b" " * 1_000_001}),
            ("unknown model", 404, {"json": self.chat(model="nobody")}),
            ("no JSON", 415, {"content": b"hello", "headers": {"Content-Type": "text/plain"}}),
            ("bad invocation", 400, {"path": "/invocations", "json": {"messages": [1]}}),
        ]
        goods = [
            self.good_stream, self.good_whole, self.good_completion, self.good_invocation,
            self.good_schema,
        ]  # fmt: skip
        dice = self.random.random()
        if dice < 0.6:
            good = self.random.choices(goods, (5, 3, 2, 2, 1))[0]
            return good.__name__.replace("_", " "), good, True
        if dice < 0.75:
            return "hang up", self.hang_up, True
        name, wanted, send = self.random.choice(bads)
        return name, lambda client: self.bad(client, wanted, **send), False

    async def client(self, until: float) -> None:
        async with httpx.AsyncClient(base_url=self.url, timeout=120) as client:
            while time.monotonic() < until:
                name, ask, good = self.draw()
                self.counts[name] += 1
                try:
                    status = await ask(client)
                    while status == 429:  # a place is needed to see that a prompt is too long
                        self.counts["429, sent again"] += 1
                        await asyncio.sleep(0.5)
                        status = await ask(client)
                except httpx.HTTPError as error:
                    self.lost.append(f"{name}: {type(error).__name__}")
                    continue
                if status != (200 if good else 0):
                    self.wrong.append(f"{name}: {status}")

    async def watch(self, process: psutil.Process, until: float) -> list[float]:
        """Resident memory in MB, once a second."""
        found = []
        while time.monotonic() < until:
            found.append(process.memory_info().rss / 1e6)
            if len(found) % 30 == 0:
                print(f"{len(found)} s {found[-1]:.0f} MB", sum(self.counts.values()),
                      len(self.lost), len(self.wrong), file=sys.stderr, flush=True)  # fmt: skip
            await asyncio.sleep(1)
        return found


async def run(url: str, pid: int, minutes: float, clients: int) -> tuple[Load, list[float]]:
    load = Load(url, seed=1)
    until = time.monotonic() + minutes * 60
    watch = asyncio.create_task(load.watch(psutil.Process(pid), until))
    await asyncio.gather(*(load.client(until) for _ in range(clients)))
    return load, await watch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--onnx", type=Path, required=True, help="what the export step made")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=12)
    arguments = parser.parse_args()
    command = ours("--running", "6", "--waiting", "4", "--quiet", "true")
    with (
        registered(arguments.onnx, prefix_cache_mb=CACHE_MB) as environment,
        server(command, environment, "/ping") as served,
    ):
        load, memory = asyncio.run(
            run(served.url, served.process.pid, arguments.minutes, arguments.clients)
        )
        idle = is_idle(served.url)
    third, sixth = len(memory) // 3, max(len(memory) // 6, 1)
    before = statistics.median(memory[third : third + sixth])
    after = statistics.median(memory[-sixth:])
    total = sum(load.counts.values()) - load.counts["429, sent again"]
    rows = [[
        arguments.minutes, total, len(load.lost), len(load.wrong), load.counts["429, sent again"],
        before, after, 100 * (after - before) / before,
    ]]  # fmt: skip
    print(json.dumps(load.counts, indent=1), Counter(load.lost), Counter(load.wrong), idle)
    write_result(
        "serve_load",
        f"{arguments.minutes:g} minutes of mixed requests, {arguments.clients} clients",
        ["minutes", "requests", "lost", "wrong status", "429", "MB after a third", "MB at the end",
         "growth, %"],
        rows,
        "A quarter of the requests has to be refused, and every seventh client hangs up. Key-value "
        f"cache kept between requests: {CACHE_MB} MB.",
        extra={"kinds": dict(load.counts), "idle_at_the_end": idle},
    )  # fmt: skip
    if load.lost or load.wrong:
        sys.exit(1)


def is_idle(url: str) -> bool:
    """Whether nothing runs or waits any more, a moment after the last client."""
    for _ in range(20):
        metrics = httpx.get(f"{url}/metrics", timeout=30).text
        if "phi3_running 0.0" in metrics and "phi3_waiting 0.0" in metrics:
            return True
        time.sleep(0.5)
    return False


if __name__ == "__main__":
    main()
