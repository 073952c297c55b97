"""Everything that is made to go wrong with a fetch, and the check of what is left afterwards.

Every fault is arranged in a fresh scene with a hub of its own. It must end in one of two ways:
the fetch *recovers* and the output has exactly the right bytes, or it is *refused* with a message
a person can use. Never is there a wrong file, a leftover, a traceback or a token.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import re
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any
from unittest import mock

from phi3_mlflow.core.errors import ProjectError
from phi3_mlflow.sources.common import FetchedSource
from phi3_mlflow.sources.fetch import fetch_source
from phi3_mlflow.sources.retrying import RetryPolicy
from phi3_mlflow.sources.spec import parse_source
from tests.sources.hub_server import COMMIT, REPO, HubServer, Reply, Request
from tests.sources.raw_checkpoint import (
    safetensors_bytes,
    tiny_checkpoint,
    tiny_tokenizer,
    with_header,
)

TOKEN = "hf_SecretSecretSecretSecretSecret"
SHARD = "model-00001-of-00002.safetensors"
RECOVERS, REFUSED = "recovers", "refused"


class CountingBar:
    """Adds up what a fetch reports."""

    def __init__(self, total: int | None) -> None:
        self.total, self.count, self.highest = total, 0, 0

    def advance(self, n: int) -> None:
        self.count += n
        self.highest = max(self.highest, self.count)


@dataclass
class Scene:
    """A hub with a sound checkpoint, and how it will be fetched; a fault changes either."""

    server: HubServer
    root: Path
    source: str = f"hf:{REPO}@{COMMIT}"
    lock: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    time_limit_s: float | None = 100.0
    remote_code: str = "refuse"
    waits: list[float] = field(default_factory=list)
    bars: list[CountingBar] = field(default_factory=list)
    patches: list[Any] = field(default_factory=list)
    policy: RetryPolicy = field(init=False)

    def __post_init__(self) -> None:
        # Patient, for machines that do much else; `impatient` for the faults that are slow.
        self.policy = RetryPolicy(sleep=self.waits.append)
        for directory in (self.out, self.downloads):
            directory.mkdir(parents=True)

    @property
    def out(self) -> Path:
        return self.root / "out"

    @property
    def downloads(self) -> Path:
        return self.root / "downloads"

    @property
    def place(self) -> Path:
        """Where the partial files of this source lie."""
        from phi3_mlflow.sources.common import slug

        place = self.downloads / slug(self.source)
        place.mkdir(exist_ok=True)
        return place

    def part(self, name: str, whole: bool = False) -> Path:
        """Where a file lies on its way."""
        digest = hashlib.sha256(self.server.files[name]).hexdigest()
        return self.place / f"{digest}-{name}{'' if whole else '.part'}"

    def fetch(self) -> FetchedSource:
        """Fetch as the scene says."""

        @contextlib.contextmanager
        def progress(_: str, total: int | None) -> Iterator[CountingBar]:
            self.bars.append(CountingBar(total))
            yield self.bars[-1]

        environment = {"HF_ENDPOINT": self.server.url, "HF_TOKEN": TOKEN, **self.environment}
        with mock.patch.dict(os.environ, environment), contextlib.ExitStack() as stack:
            for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
                if name not in self.environment:
                    os.environ.pop(name, None)
            for patch in self.patches:
                stack.enter_context(patch)
            return fetch_source(
                parse_source(self.source),
                self.out,
                sha256=self.lock,
                base_dir=self.root,
                downloads=self.downloads,
                progress=progress,
                time_limit_s=self.time_limit_s,
                policy=self.policy,
                remote_code=self.remote_code,
            )


Arrange = Callable[[Scene], None]


@dataclass(frozen=True)
class Fault:
    """Something to go wrong: its kind, its name, how it must end and what the message says."""

    kind: str
    name: str
    arrange: Arrange
    outcome: str
    message: str = ""


@dataclass
class Result:
    """How a fetch under a fault ended, as measured."""

    outcome: str
    message: str = ""
    exit_code: int = 0
    wrong_files: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    miscounted: list[str] = field(default_factory=list)
    token_seen: bool = False
    had_traceback: bool = False
    error: str = ""
    waits: list[float] = field(default_factory=list)


FAULTS: list[Fault] = []


def fault(kind: str, outcome: str, message: str = "") -> Callable[[Arrange], Arrange]:
    """Register a fault under its function's name."""

    def register(arrange: Arrange) -> Arrange:
        name = arrange.__name__.strip("_").replace("_", " ")
        FAULTS.append(Fault(kind, name, arrange, outcome, message))
        return arrange

    return register


def run_fault(one: Fault, root: Path) -> Result:
    """Arrange a fault, fetch, and look at what is left.

    Args:
        one: the fault.
        root: an empty directory.
    """
    log, printed = io.StringIO(), io.StringIO()
    handler = logging.StreamHandler(log)
    logger = logging.getLogger()
    level = logger.level
    with HubServer(tiny_checkpoint()) as server:
        scene = Scene(server, root)
        one.arrange(scene)
        expected = expected_files(server)
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                fetched = scene.fetch()
            result = Result(RECOVERS)
        except ProjectError as error:
            fetched = None
            result = Result(REFUSED, str(error), error.exit_code)
        except Exception as error:
            fetched = None
            result = Result("crashed", traceback.format_exc(), error=type(error).__name__)
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
        found = {path.name: path.read_bytes() for path in scene.out.iterdir()}
        if fetched is None:
            result.leftovers = sorted(found)
            result.wrong_files = sorted(n for n, body in found.items() if expected.get(n) != body)
        else:
            result.wrong_files = wrong_files(found, expected, fetched)
            result.miscounted = [
                f"{bar.count} of {bar.total}, {bar.highest} at most"
                for bar in scene.bars[-2:]
                if not bar.count == bar.total >= bar.highest
            ]
        result.waits = scene.waits
        result.had_traceback = "Traceback" in result.message
        texts = [result.message, log.getvalue(), printed.getvalue()]
        result.token_seen = any(TOKEN in text for text in texts) or _token_at_store(server)
    return result


def expected_files(server: HubServer) -> dict[str, bytes]:
    """What a right output holds: the files that are needed, as the repository has them."""
    from phi3_mlflow.checkpoints.layout import is_small

    return {
        name: content
        for name, content in server.files.items()
        if is_small(name) or name.endswith(".safetensors")
    }


def wrong_files(
    found: dict[str, bytes], expected: dict[str, bytes], fetched: FetchedSource
) -> list[str]:
    """Files that are missing, too many, wrong, or not what the fetch says they are."""
    names = found.keys() | expected.keys() | fetched.files.keys()
    return sorted(
        name
        for name in names
        if found.get(name) != expected.get(name)
        or name not in fetched.files
        or fetched.files[name] != (len(found[name]), hashlib.sha256(found[name]).hexdigest())
    )


def _token_at_store(server: HubServer) -> bool:
    return any("authorization" in r.headers for r in server.requests if r.server == "store")


# ---------------------------------------------------------------- changes to an answer


def status(code: int, **headers: str) -> Callable[[Reply, Request], None]:
    """Answer with a status and headers (underscores for hyphens)."""

    def change(reply: Reply, _: Request) -> None:
        reply.status, reply.body = code, b"<html>busy</html>"
        reply.headers = {key.replace("_", "-"): value for key, value in headers.items()}

    return change


def cut(at: int, reset: bool = False) -> Callable[[Reply, Request], None]:
    """Promise the whole body and end it early."""

    def change(reply: Reply, _: Request) -> None:
        reply.send_only, reply.reset = at, reset

    return change


def body(make: Callable[[bytes], bytes]) -> Callable[[Reply, Request], None]:
    """Send another body, of its own length."""

    def change(reply: Reply, _: Request) -> None:
        reply.body = make(reply.body)

    return change


def header(**headers: str | None) -> Callable[[Reply, Request], None]:
    """Set or, with None, leave out headers."""

    def change(reply: Reply, _: Request) -> None:
        for key, value in headers.items():
            if value is None:
                reply.headers.pop(key.replace("_", "-"), None)
            else:
                reply.headers[key.replace("_", "-")] = value

    return change


def attributes(**values: Any) -> Callable[[Reply, Request], None]:
    """Set attributes of the reply."""

    def change(reply: Reply, _: Request) -> None:
        for key, value in values.items():
            setattr(reply, key, value)

    return change


def flipped(content: bytes) -> bytes:
    """The content with one bit wrong in the middle."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


# ---------------------------------------------------------------- the connection


@fault("connection", RECOVERS)
def weights_cut_in_the_middle(s: Scene) -> None:
    s.server.fault(cut(100_000), times=3)


@fault("connection", RECOVERS)
def weights_cut_before_the_first_byte(s: Scene) -> None:
    s.server.fault(cut(0), times=2)


@fault("connection", RECOVERS)
def weights_cut_at_the_last_byte(s: Scene) -> None:
    s.server.fault(lambda reply, _: cut(len(reply.body) - 1)(reply, _), times=1)


@fault("connection", RECOVERS)
def connection_reset_in_the_middle(s: Scene) -> None:
    s.server.fault(cut(150_000, reset=True), times=2)


@fault("connection", RECOVERS)
def connection_reset_at_once(s: Scene) -> None:
    s.server.fault(cut(0, reset=True), route="resolve", name=SHARD, times=2)


@fault("connection", RECOVERS)
def small_file_cut(s: Scene) -> None:
    s.server.fault(cut(20), route="resolve", name="config.json", times=2)


@fault("connection", RECOVERS)
def listing_cut(s: Scene) -> None:
    s.server.fault(cut(30), route="api", times=2)


@fault("connection", RECOVERS)
def chunked_answer_left_unfinished(s: Scene) -> None:
    s.server.fault(attributes(chunked=True, send_only=70_000), times=2)


@fault("connection", RECOVERS)
def chunked_answer_without_a_length(s: Scene) -> None:
    s.server.fault(attributes(chunked=True), times=10)


@fault("connection", RECOVERS)
def no_http_at_all(s: Scene) -> None:
    s.server.fault(attributes(raw=b"\x16\x03\x01 this is not HTTP\r\n\r\n"), times=2)


@fault("connection", RECOVERS)
def hangs_up_without_an_answer(s: Scene) -> None:
    s.server.fault(attributes(raw=b""), times=2)


@fault("connection", REFUSED, "given up after 6 attempts")
def cut_for_ever_at_the_same_place(s: Scene) -> None:
    s.server.fault(cut(0), times=10_000)


@fault("connection", REFUSED, "no connection")
def nobody_listens(s: Scene) -> None:
    s.server.close()


@fault("connection", REFUSED, "given up after|time limit")
def a_few_bytes_a_connection(s: Scene) -> None:
    s.server.fault(cut(7), times=10_000)


# ---------------------------------------------------------------- slowness


def impatient(s: Scene) -> None:
    """Give up on a connection after a second of silence or a moment of dripping."""
    s.policy = replace(s.policy, read_timeout_s=1.0, stall_window_s=0.2)


@fault("slowness", RECOVERS)
def silence_before_the_answer(s: Scene) -> None:
    impatient(s)
    s.server.fault(attributes(pause_s=5.0), times=1)


@fault("slowness", RECOVERS)
def silence_before_the_listing(s: Scene) -> None:
    impatient(s)
    s.server.fault(attributes(pause_s=5.0), route="api", times=1)


@fault("slowness", RECOVERS)
def slow_drip_then_normal(s: Scene) -> None:
    impatient(s)
    s.server.fault(attributes(drip_s=0.02), times=2)


@fault("slowness", REFUSED, "only .* bytes came|time limit")
def slow_drip_for_ever(s: Scene) -> None:
    impatient(s)
    s.server.fault(attributes(drip_s=0.05), times=10_000)


@fault("slowness", REFUSED, "time limit of 0.5 s")
def slow_drip_against_the_time_limit(s: Scene) -> None:
    s.time_limit_s = 0.5
    s.server.fault(attributes(drip_s=0.01), times=10_000)


@fault("slowness", REFUSED, "time limit of 0.5 s")
def listing_drips_against_the_time_limit(s: Scene) -> None:
    s.time_limit_s = 0.5
    s.server.fault(attributes(drip_s=0.01), route="api", times=10_000)


@fault("slowness", REFUSED, "time limit")
def no_time_at_all(s: Scene) -> None:
    s.time_limit_s = 0.0


# ---------------------------------------------------------------- throttling and server errors


@fault("throttling", RECOVERS)
def too_many_requests_with_seconds(s: Scene) -> None:
    s.server.fault(status(429, Retry_After="3"), route="resolve", times=3)


@fault("throttling", RECOVERS)
def too_many_requests_with_a_date(s: Scene) -> None:
    moment = format_datetime(datetime.now(UTC) + timedelta(seconds=8), usegmt=True)
    s.server.fault(status(429, Retry_After=moment), times=1)


@fault("throttling", RECOVERS)
def too_many_requests_with_a_rate_limit(s: Scene) -> None:
    s.server.fault(status(429, RateLimit='"api";r=0;t=5'), route="api", times=1)


@fault("throttling", RECOVERS)
def too_many_requests_with_nonsense(s: Scene) -> None:
    s.server.fault(status(429, Retry_After="soon"), times=2)


@fault("throttling", REFUSED, "asks to come back in 86400 s")
def too_many_requests_until_tomorrow(s: Scene) -> None:
    s.time_limit_s = None
    s.server.fault(status(429, Retry_After="86400"), route="api", times=1)


@fault("throttling", REFUSED, "would pass the time limit")
def retry_after_beyond_the_time_limit(s: Scene) -> None:
    s.server.fault(status(503, Retry_After="120"), times=1)


@fault("throttling", REFUSED, "answers 429")
def too_many_requests_for_ever(s: Scene) -> None:
    s.server.fault(status(429, Retry_After="1"), route="resolve", times=10_000)


@fault("server error", RECOVERS)
def server_errors_500_502_503_504(s: Scene) -> None:
    for code in (500, 502, 503, 504):
        s.server.fault(status(code), times=1)


@fault("server error", RECOVERS)
def store_times_out_408(s: Scene) -> None:
    s.server.fault(status(408), times=2)


@fault("server error", RECOVERS)
def listing_fails_500(s: Scene) -> None:
    s.server.fault(status(500), route="api", times=3)


@fault("server error", REFUSED, "answers 500")
def server_error_for_ever(s: Scene) -> None:
    s.server.fault(status(500), route="api", times=10_000)


@fault("server error", RECOVERS)
def error_after_a_part(s: Scene) -> None:
    s.server.fault(cut(100_000), times=1)
    s.server.fault(status(503), times=2)


# ---------------------------------------------------------------- wrong bytes, wrong lengths


@fault("wrong bytes", RECOVERS)
def one_bit_flipped_once(s: Scene) -> None:
    s.server.fault(body(flipped), times=1)


@fault("wrong bytes", REFUSED, r"sha256 expected [0-9a-f]{64}, found [0-9a-f]{64}")
def one_bit_flipped_always(s: Scene) -> None:
    s.server.fault(body(flipped), times=10_000)


@fault("wrong bytes", REFUSED, r"config\.json.*git blob expected [0-9a-f]{40}")
def configuration_changed_always(s: Scene) -> None:
    s.server.fault(
        body(lambda b: b.replace(b"silu", b"relu")), "resolve", "config.json", times=10_000
    )


@fault("wrong bytes", REFUSED, "given up")
def error_page_instead_of_weights(s: Scene) -> None:
    s.server.fault(body(lambda _: b"<html>please log in</html>"), times=10_000)


@fault("wrong bytes", RECOVERS)
def error_page_once(s: Scene) -> None:
    s.server.fault(body(lambda _: b"<html>please log in</html>"), times=1)


@fault("wrong bytes", REFUSED, "sha256 expected")
def nothing_but_zeros(s: Scene) -> None:
    s.server.fault(body(lambda b: bytes(len(b))), times=10_000)


@fault("wrong bytes", RECOVERS)
def other_content_after_the_cut(s: Scene) -> None:
    s.server.fault(cut(100_000), times=1)
    s.server.fault(body(flipped), times=1)


@fault("wrong length", RECOVERS)
def too_short_and_says_so(s: Scene) -> None:
    s.server.fault(body(lambda b: b[:-10]), times=2)


@fault("wrong length", RECOVERS)
def too_long_and_says_so(s: Scene) -> None:
    s.server.fault(body(lambda b: b + b"more"), times=2)


@fault("wrong length", RECOVERS)
def too_long_without_a_length(s: Scene) -> None:
    def change(reply: Reply, _: Request) -> None:
        reply.body, reply.chunked = reply.body + bytes(1000), True

    s.server.fault(change, times=2)


@fault("wrong length", REFUSED, "sends more than")
def endless_body(s: Scene) -> None:
    def change(reply: Reply, _: Request) -> None:
        reply.body, reply.chunked = reply.body * 3, True

    s.server.fault(change, times=10_000)


@fault("wrong length", RECOVERS)
def announces_more_than_it_sends(s: Scene) -> None:
    s.server.fault(header(Content_Length="99999999"), times=2)


@fault("wrong length", RECOVERS)
def announces_less_than_it_sends(s: Scene) -> None:
    s.server.fault(header(Content_Length="1000"), times=2)


@fault("wrong length", RECOVERS)
def nonsense_as_length(s: Scene) -> None:
    s.server.fault(header(Content_Length="-5"), times=2)


@fault("wrong length", RECOVERS)
def empty_body(s: Scene) -> None:
    s.server.fault(body(lambda _: b""), times=2)


# ---------------------------------------------------------------- encodings


@fault("encoding", RECOVERS)
def compressed_although_not_asked_for(s: Scene) -> None:
    import gzip

    def change(reply: Reply, _: Request) -> None:
        reply.body = gzip.compress(reply.body)
        reply.headers["Content-Encoding"] = "gzip"

    s.server.fault(change, route="resolve", name="tokenizer.json", times=1)


@fault("encoding", RECOVERS)
def claims_to_be_compressed_and_is_not(s: Scene) -> None:
    s.server.fault(header(Content_Encoding="gzip"), times=2)


@fault("encoding", REFUSED, "sends more than")
def compressed_bomb(s: Scene) -> None:
    import gzip

    bomb = gzip.compress(bytes(5_000_000))

    def change(reply: Reply, _: Request) -> None:
        reply.body = bomb
        reply.headers["Content-Encoding"] = "gzip"

    s.server.fault(change, route="resolve", name="tokenizer.json", times=10_000)


# ---------------------------------------------------------------- ranges


def _after_a_cut(s: Scene, change: Callable[[Reply, Request], None], times: int = 1) -> None:
    s.server.fault(cut(100_000), name=SHARD, times=1)
    s.server.fault(change, name=SHARD, times=times)


@fault("range", RECOVERS)
def range_ignored(s: Scene) -> None:
    def change(reply: Reply, request: Request) -> None:
        reply.status, reply.body = 200, s.server.files[request.name]
        reply.headers.pop("Content-Range", None)

    _after_a_cut(s, change)


@fault("range", RECOVERS)
def another_range_than_asked_for(s: Scene) -> None:
    def change(reply: Reply, request: Request) -> None:
        content = s.server.files[request.name]
        reply.headers["Content-Range"] = f"bytes 0-{len(content) - 1}/{len(content)}"
        reply.body = content

    _after_a_cut(s, change)


@fault("range", RECOVERS)
def range_lies_about_where_it_starts(s: Scene) -> None:
    def change(reply: Reply, request: Request) -> None:
        reply.body = s.server.files[request.name][: len(reply.body)]

    _after_a_cut(s, change)


@fault("range", RECOVERS)
def part_without_saying_which(s: Scene) -> None:
    _after_a_cut(s, header(Content_Range=None))


@fault("range", RECOVERS)
def range_not_satisfiable(s: Scene) -> None:
    _after_a_cut(s, status(416))


@fault("range", RECOVERS)
def total_of_the_range_is_another(s: Scene) -> None:
    _after_a_cut(s, header(Content_Range="bytes 100000-200000/200001"))


@fault("range", REFUSED, "Content-Range")
def partial_content_never_asked_for(s: Scene) -> None:
    s.server.fault(attributes(status=206), times=10_000)


# ---------------------------------------------------------------- redirects


@fault("redirect", REFUSED, "redirects")
def redirects_in_a_circle(s: Scene) -> None:
    def change(reply: Reply, request: Request) -> None:
        reply.headers["Location"] = request.path

    s.server.fault(change, route="resolve", name=SHARD, times=10_000)


@fault("redirect", REFUSED, "does not say where")
def redirect_without_a_target(s: Scene) -> None:
    s.server.fault(header(Location=None), route="resolve", name=SHARD, times=10_000)


@fault("redirect", REFUSED, "redirect to file scheme")
def redirect_to_a_local_file(s: Scene) -> None:
    s.server.fault(header(Location="file:///etc/passwd"), "resolve", SHARD, times=10_000)


@fault("redirect", REFUSED, "unreadable address")
def redirect_to_nonsense(s: Scene) -> None:
    s.server.fault(header(Location="http://[half:99999999/x"), "resolve", SHARD, times=10_000)


@fault("redirect", REFUSED, "answers 404|no connection|EntryNotFound|given up|404")
def redirect_to_a_place_without_the_file(s: Scene) -> None:
    target = f"{s.server.store_url}/lfs/{'0' * 64}"
    s.server.fault(header(Location=target), "resolve", SHARD, times=10_000)


@fault("redirect", RECOVERS)
def redirect_to_another_host_gets_no_token(s: Scene) -> None:
    s.server.token = TOKEN


@fault("redirect", REFUSED, "announces|expected")
def redirect_to_another_file(s: Scene) -> None:
    other = hashlib.sha256(s.server.files[SHARD.replace("00001-", "00002-")]).hexdigest()
    target = f"{s.server.store_url}/lfs/{other}"
    s.server.fault(header(Location=target), "resolve", SHARD, times=10_000)


# ---------------------------------------------------------------- identity


@fault("identity", REFUSED, "asked for commit .* serves")
def file_of_another_commit(s: Scene) -> None:
    s.server.fault(header(X_Repo_Commit="f" * 40), "resolve", times=10_000)


@fault("identity", REFUSED, "digest expected .* serves")
def etag_of_another_content(s: Scene) -> None:
    s.server.fault(header(X_Linked_Etag=f'"{"f" * 64}"'), "resolve", SHARD, times=10_000)


@fault("identity", REFUSED, "digest expected .* serves|git blob expected")
def small_file_replaced_after_the_listing(s: Scene) -> None:
    changed = s.server.files["tokenizer.json"].replace(b"t5", b"u5")

    def change(reply: Reply, _: Request) -> None:
        s.server.files["tokenizer.json"] = changed

    s.server.fault(change, route="api", times=1)


@fault("identity", REFUSED, "listed, but not there")
def file_deleted_after_the_listing(s: Scene) -> None:
    def change(reply: Reply, _: Request) -> None:
        del s.server.files["tokenizer.json"]

    s.server.fault(change, route="api", times=1)


@fault("identity", REFUSED, "another commit")
def listing_of_another_commit(s: Scene) -> None:
    s.server.listing_change = lambda info: info.update(sha="f" * 40)


# ---------------------------------------------------------------- the listing


def _listing(s: Scene, change: Callable[[dict[str, Any]], None]) -> None:
    s.server.listing_change = change


def _sibling(info: dict[str, Any], name: str) -> dict[str, Any]:
    return next(sibling for sibling in info["siblings"] if sibling["rfilename"] == name)


@fault("listing", REFUSED, "not what the hub answers")
def listing_is_a_web_page(s: Scene) -> None:
    s.server.fault(body(lambda _: b"<html>hello</html>"), route="api", times=10_000)


@fault("listing", REFUSED, "not what the hub answers")
def listing_is_a_list(s: Scene) -> None:
    s.server.fault(body(lambda _: b"[]"), route="api", times=10_000)


@fault("listing", REFUSED, "not what the hub answers")
def listing_is_nested_without_end(s: Scene) -> None:
    s.server.fault(body(lambda _: b"[" * 200_000), route="api", times=10_000)


@fault("listing", REFUSED, "larger than")
def listing_is_enormous(s: Scene) -> None:
    s.server.fault(body(lambda b: b + b" " * 51_000_000), route="api", times=10_000)


@fault("listing", REFUSED, "no commit")
def listing_without_a_commit(s: Scene) -> None:
    _listing(s, lambda info: info.pop("sha"))


@fault("listing", REFUSED, "no files")
def listing_without_files(s: Scene) -> None:
    _listing(s, lambda info: info.update(siblings=[]))


@fault("listing", REFUSED, "size of")
def listing_with_a_negative_size(s: Scene) -> None:
    _listing(s, lambda info: _sibling(info, "config.json").update(size=-1))


@fault("listing", REFUSED, "not what the hub answers")
def listing_with_a_size_as_text(s: Scene) -> None:
    _listing(s, lambda info: _sibling(info, "config.json").update(size="many"))


@fault("listing", REFUSED, "digest of")
def listing_with_half_a_digest(s: Scene) -> None:
    _listing(s, lambda info: _sibling(info, SHARD)["lfs"].update(sha256="abc"))


@fault("listing", REFUSED, "not what the hub answers")
def listing_without_digests(s: Scene) -> None:
    _listing(s, lambda info: _sibling(info, SHARD)["lfs"].pop("sha256"))


@fault("listing", REFUSED, "digest expected .* serves|sha256 expected")
def listing_with_a_wrong_digest(s: Scene) -> None:
    _listing(s, lambda info: _sibling(info, SHARD)["lfs"].update(sha256="a" * 64))


@fault("listing", REFUSED, "given up|announces")
def listing_with_a_wrong_size(s: Scene) -> None:
    _listing(s, lambda info: _sibling(info, SHARD)["lfs"].update(size=1234))


@fault("listing", REFUSED, "file name 'config.json'")
def listing_names_a_file_twice(s: Scene) -> None:
    _listing(s, lambda info: info["siblings"].append(dict(_sibling(info, "config.json"))))


def _rename(s: Scene, name: str) -> None:
    _listing(s, lambda info: _sibling(info, "LICENSE").update(rfilename=name))


@fault("listing", REFUSED, "leaves its place")
def listing_with_a_name_that_climbs(s: Scene) -> None:
    _rename(s, "../../config.json")


@fault("listing", REFUSED, "leaves its place")
def listing_with_an_absolute_name(s: Scene) -> None:
    _rename(s, "/etc/cron.d/tokenizer.json")


@fault("listing", REFUSED, "leaves its place")
def listing_with_a_backslash(s: Scene) -> None:
    _rename(s, "..\\tokenizer.json")


@fault("listing", REFUSED, "leaves its place")
def listing_with_a_line_break(s: Scene) -> None:
    _rename(s, "LICENSE\ncontinue")


@fault("listing", REFUSED, "no such file is larger")
def listing_with_an_enormous_configuration(s: Scene) -> None:
    _listing(s, lambda info: _sibling(info, "tokenizer.json").update(size=10**12 // 2))


# ---------------------------------------------------------------- access


@fault("access", REFUSED, r"does not give .* \(401\).*conditions")
def gated_and_the_token_is_wrong(s: Scene) -> None:
    s.server.token = "hf_another"


@fault("access", REFUSED, "set HF_TOKEN")
def gated_and_there_is_no_token(s: Scene) -> None:
    s.server.token = "hf_another"
    s.environment = {"HF_TOKEN": "", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}


@fault("access", REFUSED, r"does not give .* \(403\)")
def forbidden(s: Scene) -> None:
    s.server.fault(status(403, X_Error_Code="GatedRepo"), route="resolve", times=10_000)


@fault("access", REFUSED, "does not exist, or is private")
def no_such_repository(s: Scene) -> None:
    s.source = f"hf:acme/nothing@{COMMIT}"


@fault("access", REFUSED, "has no revision")
def no_such_commit(s: Scene) -> None:
    s.source = f"hf:{REPO}@{'d' * 40}"


@fault("access", REFUSED, "was taken down")
def taken_down(s: Scene) -> None:
    s.server.fault(status(451), route="api", times=10_000)


@fault("access", REFUSED, "characters outside ASCII")
def token_that_cannot_be_sent(s: Scene) -> None:
    s.environment = {"HF_TOKEN": TOKEN + "\u00e9"}


@fault("access", REFUSED, "does not give")
def token_echoed_by_the_server(s: Scene) -> None:
    s.server.fault(
        status(401, X_Error_Code="GatedRepo", X_Error_Message=f"bad token {TOKEN}"), "api", times=99
    )


@fault("access", REFUSED, "HF_ENDPOINT is not https")
def token_over_plain_http(s: Scene) -> None:
    s.environment = {"HF_ENDPOINT": "http://hub.invalid"}


@fault("access", REFUSED, "HF_HUB_OFFLINE forbids")
def offline_with_nothing_there(s: Scene) -> None:
    s.environment = {"HF_HUB_OFFLINE": "1"}


# ---------------------------------------------------------------- the lock


def _lock(s: Scene) -> None:
    s.lock = {
        name: hashlib.sha256(content).hexdigest()
        for name, content in expected_files(s.server).items()
    }


@fault("lock", REFUSED, r"lock and the source differ: sha256 expected [0-9a-f]{64}")
def lock_of_other_weights(s: Scene) -> None:
    _lock(s)
    s.lock[SHARD] = "b" * 64


@fault("lock", REFUSED, r"config\.json.*sha256 expected b{64}, found [0-9a-f]{64}")
def lock_of_another_configuration(s: Scene) -> None:
    _lock(s)
    s.lock["config.json"] = "b" * 64


@fault("lock", REFUSED, "is in the source and not in the lock")
def lock_without_a_file(s: Scene) -> None:
    _lock(s)
    del s.lock["LICENSE"]


@fault("lock", REFUSED, "is locked, the source has no such file")
def lock_with_one_file_more(s: Scene) -> None:
    _lock(s)
    s.lock["merges.txt"] = "b" * 64


@fault("lock", REFUSED, "is not 64 hex digits")
def lock_with_half_a_digest(s: Scene) -> None:
    s.lock = {"config.json": "b" * 32}


# ---------------------------------------------------------------- what lies on the disk


@fault("disk", RECOVERS)
def part_on_the_disk_is_damaged(s: Scene) -> None:
    s.part(SHARD).write_bytes(flipped(s.server.files[SHARD][:200_000]))


@fault("disk", RECOVERS)
def part_on_the_disk_is_too_long(s: Scene) -> None:
    s.part(SHARD).write_bytes(s.server.files[SHARD] + b"more")


@fault("disk", RECOVERS)
def part_on_the_disk_is_whole_and_wrong(s: Scene) -> None:
    s.part(SHARD).write_bytes(flipped(s.server.files[SHARD]))


@fault("disk", RECOVERS)
def part_on_the_disk_is_a_link(s: Scene) -> None:
    outside = s.root / "outside"
    outside.write_bytes(b"precious")
    s.part(SHARD).symlink_to(outside)


@fault("disk", RECOVERS)
def whole_file_on_the_disk_is_damaged(s: Scene) -> None:
    s.part(SHARD, whole=True).write_bytes(flipped(s.server.files[SHARD]))


@fault("disk", RECOVERS)
def whole_file_on_the_disk_is_a_link(s: Scene) -> None:
    outside = s.root / "outside"
    outside.write_bytes(s.server.files[SHARD])
    s.part(SHARD, whole=True).symlink_to(outside)


@fault("disk", REFUSED, "needs .* GB, .* free")
def no_room_before_the_download(s: Scene) -> None:
    usage = mock.Mock(free=1000)
    s.patches.append(mock.patch("shutil.disk_usage", return_value=usage))


@fault("disk", REFUSED, "No space left")
def disk_full_in_the_middle(s: Scene) -> None:
    import errno

    from phi3_mlflow.sources.digests import DigestingFile

    sound = DigestingFile.write

    def write(self: DigestingFile, chunk: bytes) -> None:
        if self.size + len(chunk) > 100_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        sound(self, chunk)

    s.patches.append(mock.patch.object(DigestingFile, "write", write))


@fault("disk", RECOVERS)
def output_on_another_disk(s: Scene) -> None:
    import errno

    error = OSError(errno.EXDEV, "Invalid cross-device link")
    sound = Path.replace

    def refuse(self: Path, target: Path) -> Path:
        if Path(target).parent == s.out:
            raise error
        return sound(self, target)

    s.patches.append(mock.patch.object(Path, "replace", refuse))


@fault("disk", REFUSED, "time limit|waiting for another fetch")
def another_fetch_holds_the_downloads(s: Scene) -> None:
    from filelock import FileLock

    s.time_limit_s = 0.3
    lock = FileLock(str(s.place) + ".lock", is_singleton=False)
    lock.acquire()
    # Held until the fetch is over, then given back with the scene.
    threading.Timer(3.0, lock.release).start()


@fault("interruption", REFUSED, "time limit")
def time_runs_out_between_two_files(s: Scene) -> None:
    ticks = iter(range(10_000))
    s.time_limit_s = 30.0
    s.policy = replace(s.policy, clock=lambda: float(next(ticks)))


@fault("interruption", RECOVERS)
def interrupted_twice_and_run_again(s: Scene) -> None:
    for at in (60_000, 120_000):
        s.server.fault(cut(at), name=SHARD, times=1)
        s.server.fault(status(403), name=SHARD, times=1)
        with contextlib.suppress(ProjectError):
            s.fetch()
    assert s.part(SHARD).stat().st_size == 180_000
    s.server.requests.clear()


# ---------------------------------------------------------------- what must not be loaded


def _files(s: Scene, **changed: bytes | None) -> None:
    for name, content in changed.items():
        if content is None:
            del s.server.files[name]
        else:
            s.server.files[name] = content


def _config(s: Scene, **changed: Any) -> None:
    config = json.loads(s.server.files["config.json"]) | changed
    s.server.files["config.json"] = json.dumps(config).encode()


@fault("refused content", REFUSED, "pytorch_model.bin.*can run code")
def only_pickled_weights(s: Scene) -> None:
    for name in [n for n in s.server.files if "safetensors" in n]:
        del s.server.files[name]
    s.server.files["pytorch_model.bin"] = b"\x80\x04cos\nsystem\n."


@fault("refused content", REFUSED, "code of its own.*auto_map")
def configuration_with_auto_map(s: Scene) -> None:
    _config(s, auto_map={"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"})


@fault("refused content", REFUSED, "tokenizer_config.json: auto_map")
def tokenizer_with_auto_map(s: Scene) -> None:
    s.server.files["tokenizer_config.json"] = b'{"auto_map": {"AutoTokenizer": ["t.T", null]}}'


@fault("refused content", REFUSED, "attn_implementation")
def attention_from_a_kernel_repository(s: Scene) -> None:
    _config(s, attn_implementation="evil/kernel")


@fault("refused content", REFUSED, "only .'Phi3ForCausalLM'. is supported")
def unknown_architecture(s: Scene) -> None:
    _config(s, architectures=["EvilForCausalLM"], model_type="evil")


@fault("refused content", REFUSED, "config.json is not JSON")
def configuration_is_no_json(s: Scene) -> None:
    s.server.files["config.json"] = b"{'architectures': }"


@fault("refused content", REFUSED, r"needs \(2048, 128\), found")
def tensors_do_not_fit_the_configuration(s: Scene) -> None:
    _config(s, hidden_size=128)


@fault("refused content", REFUSED, "takes .* bytes, data_offsets .* hold")
def header_lies_about_sizes(s: Scene) -> None:
    def lie(head: dict[str, Any]) -> None:
        next(iter(v for k, v in head.items() if k != "__metadata__"))["shape"][0] += 1

    s.server.files[SHARD] = safetensors_bytes(
        {"a": ("F32", (4, 4)), "b": ("F32", (2,))}, change=lie
    )


@fault("refused content", REFUSED, "claims .* bytes")
def header_longer_than_the_file(s: Scene) -> None:
    s.server.files[SHARD] = (10**7).to_bytes(8, "little") + b"{}"


@fault("refused content", REFUSED, "appears twice")
def header_with_a_tensor_twice(s: Scene) -> None:
    one = '"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    s.server.files[SHARD] = with_header(f"{{{one}, {one}}}".encode(), bytes(4))


@fault("refused content", REFUSED, "only .safetensors files in the same directory")
def index_names_a_file_outside(s: Scene) -> None:
    index = {"weight_map": {"a": "../../secret.safetensors"}}
    s.server.files["model.safetensors.index.json"] = json.dumps(index).encode()


@fault("refused content", REFUSED, "names files that are missing")
def index_names_a_missing_file(s: Scene) -> None:
    index = {"weight_map": {"a": "model-00009-of-00009.safetensors"}}
    s.server.files["model.safetensors.index.json"] = json.dumps(index).encode()


@fault("refused content", REFUSED, "the embedding has 2048 rows")
def tokenizer_with_more_tokens_than_rows(s: Scene) -> None:
    s.server.files["tokenizer.json"] = json.dumps(tiny_tokenizer(2100)).encode()


@fault("refused content", REFUSED, "tokenizer.json is missing")
def no_tokenizer(s: Scene) -> None:
    del s.server.files["tokenizer.json"]


def matches(one: Fault, result: Result) -> bool:
    """Whether the message of a refusal says what it should."""
    return re.search(one.message, result.message, re.DOTALL) is not None
