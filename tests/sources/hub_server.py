"""A local server that speaks the hub's API, and misbehaves on demand.

Two servers run: the hub, and the store where its LFS files are, under another host name as in
reality. Whatever is asked of either is recorded.

| route | answer |
|---|---|
| `GET /api/models/ID[/revision/REV]` | commit and files; with `?blobs=true` sizes and digests |
| `GET /api/models/ID/tree/REV?recursive=...` | the files as a tree |
| `GET, HEAD /ID/resolve/REV/FILE` | the file, or 302 to the store for an LFS file |
| `GET, HEAD /lfs/SHA256` (store) | the LFS file; ranges |
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

REPO = "acme/tiny-phi3"
COMMIT = "c0ffee" + "0" * 34


@dataclass
class Reply:
    """An answer about to be sent; a fault changes it.

    Attributes:
        status: HTTP status.
        headers: without Content-Length, which is the body's unless given here.
        body: the whole body.
        send_only: stop after so many bytes of the body and close.
        reset: close with a reset instead of an orderly end.
        drip_s: send one byte at a time with so many seconds between.
        rate: bytes a second, 0 for as fast as it goes.
        pause_s: wait so long before the first byte.
        linger_s: keep the connection open so long after the last byte.
        chunked: send without Content-Length, in chunks; `send_only` leaves it unfinished.
        raw: send these bytes instead of an HTTP answer.
    """

    status: int
    headers: dict[str, str]
    body: bytes = b""
    send_only: int | None = None
    reset: bool = False
    drip_s: float = 0.0
    rate: float = 0.0
    pause_s: float = 0.0
    linger_s: float = 0.0
    chunked: bool = False
    raw: bytes | None = None


@dataclass
class Request:
    """A request that came in. `route` is api, resolve or lfs; `name` a file's, where it has one."""

    server: str
    method: str
    path: str
    headers: dict[str, str]
    route: str = ""
    name: str = ""


Change = Callable[[Reply, Request], None]


@dataclass
class _Fault:
    route: str
    name: str | None
    change: Change
    times: int
    skip: int


@dataclass
class HubServer:
    """Serves one repository; a context manager.

    Attributes:
        files: the repository's files at `commit`.
        commit: what `main` stands for.
        lfs: which files are kept in the store.
        token: when set, requests without it are refused (a gated repository).
        listing_change: changes the listing before it is sent.
        requests: everything that was asked.
    """

    files: dict[str, bytes]
    commit: str = COMMIT
    token: str | None = None
    listing_change: Callable[[dict[str, Any]], None] | None = None
    requests: list[Request] = field(default_factory=list)
    _faults: list[_Fault] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._digests: dict[int, tuple[bytes, str]] = {}
        self._stop = threading.Event()
        self._hub = _server(self, "hub")
        self._store = _server(self, "store")
        self.url = f"http://127.0.0.1:{self._hub.server_address[1]}"
        self.store_url = f"http://localhost:{self._store.server_address[1]}"

    def fault(
        self,
        change: Change,
        route: str = "lfs",
        name: str | None = None,
        times: int = 1,
        skip: int = 0,
    ) -> None:
        """Change the next answers on a route (to a file), after leaving some as they are."""
        self._faults.append(_Fault(route, name, change, times, skip))

    def is_lfs(self, name: str) -> bool:
        """As on the hub: weights are LFS files, texts are git blobs."""
        return name.endswith((".safetensors", ".bin"))

    def asked(self, route: str, name: str | None = None) -> list[Request]:
        """The requests on a route."""
        return [r for r in self.requests if r.route == route and name in (None, r.name)]

    def sha256(self, name: str) -> str:
        """The digest of a file, computed once as long as its content is the same object."""
        content = self.files[name]
        if id(content) not in self._digests:
            self._digests[id(content)] = content, hashlib.sha256(content).hexdigest()
        return self._digests[id(content)][1]

    def close(self) -> None:
        """Stop listening."""
        self._stop.set()
        for server in (self._hub, self._store):
            server.shutdown()
            server.server_close()

    def __enter__(self) -> HubServer:
        for server in (self._hub, self._store):
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._stop.is_set():
            self.close()

    def answer(self, request: Request) -> Reply:
        """What to send, faults included."""
        with self._lock:
            reply = self._sound(request)
            self.requests.append(request)
            for fault in self._faults:
                if fault.route != request.route or fault.name not in (None, request.name):
                    continue
                if fault.skip > 0:
                    fault.skip -= 1
                elif fault.times > 0:
                    fault.times -= 1
                    fault.change(reply, request)
                    break
            return reply

    def _sound(self, request: Request) -> Reply:
        address = urlsplit(request.path)
        path = unquote(address.path)
        if request.server == "store":
            request.route = "lfs"
            return self._lfs(request, path.removeprefix("/lfs/"))
        if match := re.fullmatch(rf"/api/models/{REPO}(?:/revision/([^/]+))?", path):
            request.route = "api"
            return self._gate(request) or self._info(match[1] or "main", parse_qs(address.query))
        if match := re.fullmatch(rf"/api/models/{REPO}/tree/([^/]+)", path):
            request.route = "tree"
            return self._gate(request) or self._tree(match[1])
        if match := re.fullmatch(rf"/{REPO}/resolve/([^/]+)/(.+)", path):
            request.route, request.name = "resolve", match[2]
            return self._gate(request) or self._resolve(match[1], match[2], request)
        return _error(404, "RepoNotFound", "Repository not found")

    def _gate(self, request: Request) -> Reply | None:
        if self.token and request.headers.get("authorization") != f"Bearer {self.token}":
            return _error(401, "GatedRepo", f"Access to model {REPO} is restricted")
        return None

    def _info(self, revision: str, query: dict[str, list[str]]) -> Reply:
        if revision not in ("main", self.commit):
            return _error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        siblings: list[dict[str, Any]] = [{"rfilename": name} for name in self.files]
        if query.get("blobs", [""])[0].lower() == "true":
            for sibling in siblings:
                entry = self._entry(sibling["rfilename"])
                sibling |= {"size": entry["size"], "blobId": entry["oid"]}
                if lfs := entry.get("lfs"):
                    sibling["lfs"] = {"sha256": lfs["oid"], "size": lfs["size"], "pointerSize": 134}
        info = {"_id": "1", "id": REPO, "modelId": REPO, "sha": self.commit, "siblings": siblings}
        info |= {"private": False, "gated": False, "disabled": False, "tags": [], "downloads": 0}
        if self.listing_change:
            self.listing_change(info)
        return _json(info)

    def _tree(self, revision: str) -> Reply:
        if revision not in ("main", self.commit):
            return _error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return _json([self._entry(name) for name in self.files])

    def _entry(self, name: str) -> dict[str, Any]:
        content = self.files[name]
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content)}
        if not self.is_lfs(name):
            return entry | {"oid": git_blob(content)}
        sha256 = self.sha256(name)
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\n".encode()
        lfs = {"oid": sha256, "size": len(content), "pointerSize": 134}
        return entry | {"oid": git_blob(pointer), "lfs": lfs}

    def _resolve(self, revision: str, name: str, request: Request) -> Reply:
        if revision not in ("main", self.commit):
            return _error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if name not in self.files:
            return _error(404, "EntryNotFound", "Entry not found")
        content = self.files[name]
        headers = {"X-Repo-Commit": self.commit, "Accept-Ranges": "bytes"}
        if not self.is_lfs(name):
            return _ranged(content, {**headers, "ETag": f'"{git_blob(content)}"'}, request)
        sha256 = self.sha256(name)
        headers |= {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(content))}
        headers["Location"] = f"{self.store_url}/lfs/{sha256}?Signature=signed-secret"
        return Reply(302, headers, b"Found")

    def _lfs(self, request: Request, sha256: str) -> Reply:
        for name, content in self.files.items():
            if self.is_lfs(name) and self.sha256(name) == sha256:
                request.name = name
                return _ranged(content, {"ETag": f'"{sha256[:32]}"'}, request)
        return Reply(404, {}, b"no such object")


def git_blob(content: bytes) -> str:
    """The id git gives a file."""
    header = f"blob {len(content)}\0".encode()
    return hashlib.sha1(header + content, usedforsecurity=False).hexdigest()


def _json(value: Any) -> Reply:
    return Reply(200, {"Content-Type": "application/json"}, json.dumps(value).encode())


def _error(status: int, code: str, message: str) -> Reply:
    headers = {"X-Error-Code": code, "X-Error-Message": message}
    return Reply(status, headers, json.dumps({"error": message}).encode())


def _ranged(content: bytes, headers: dict[str, str], request: Request) -> Reply:
    match = re.fullmatch(r"bytes=(\d+)-", request.headers.get("range", ""))
    if not match:
        return Reply(200, headers, content)
    start, size = int(match[1]), len(content)
    if start >= size:
        return Reply(416, {"Content-Range": f"bytes */{size}"})
    headers = {**headers, "Content-Range": f"bytes {start}-{size - 1}/{size}"}
    return Reply(206, headers, content[start:])


def _server(hub: HubServer, kind: str) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            headers = {key.lower(): value for key, value in self.headers.items()}
            reply = hub.answer(Request(kind, self.command, self.path, headers))
            try:
                self._send(reply)
            except (BrokenPipeError, ConnectionError):
                self.close_connection = True

        do_HEAD = do_GET

        def _send(self, reply: Reply) -> None:
            hub._stop.wait(reply.pause_s)
            if reply.raw is not None:
                self.wfile.write(reply.raw)
                self.close_connection = True
                return
            self.send_response(reply.status)
            for key, value in reply.headers.items():
                self.send_header(key, value)
            if reply.chunked:
                self.send_header("Transfer-Encoding", "chunked")
            elif "Content-Length" not in reply.headers:
                self.send_header("Content-Length", str(len(reply.body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            self._body(reply)
            if reply.send_only is not None or "Content-Length" in reply.headers:
                self.close_connection = True
            if reply.reset:
                # A linger of zero makes the close a reset.
                self.connection.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                )
                self.connection.close()
                self.close_connection = True

        def _body(self, reply: Reply) -> None:
            body = reply.body if reply.send_only is None else reply.body[: reply.send_only]
            if reply.chunked:
                for start in range(0, len(body), 10_000):
                    piece = body[start : start + 10_000]
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                if reply.send_only is None:
                    self.wfile.write(b"0\r\n\r\n")
                return
            if reply.rate:
                started, view = time.monotonic(), memoryview(body)
                for start in range(0, len(body), 1 << 18):
                    self.wfile.write(view[start : start + (1 << 18)])
                    hub._stop.wait(max(0.0, started + start / reply.rate - time.monotonic()))
                return
            if not reply.drip_s:
                self.wfile.write(body)
                hub._stop.wait(reply.linger_s)
                return
            for byte in body:
                self.wfile.write(bytes([byte]))
                if hub._stop.wait(reply.drip_s):
                    return

        def log_message(self, format: str, *args: object) -> None:
            return

        def finish(self) -> None:
            try:
                super().finish()
            except (OSError, ValueError):
                return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    return server
