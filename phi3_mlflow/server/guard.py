"""What every request passes: who may ask, how much it may send, and what the log says of it."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
import traceback
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request

from phi3_mlflow.server.errors import ApiError, from_exception
from phi3_mlflow.server.page import ASSETS
from phi3_mlflow.server.settings import ServerSettings, is_loopback

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from phi3_mlflow.server.metrics import Metrics

log = logging.getLogger("phi3_mlflow.server")
OPEN = ("/", *ASSETS, "/ping", "/health", "/version")
"""What is answered without a key: nothing of the model's."""
_ENDPOINTS = (
    *OPEN, "/metrics", "/invocations", "/v1/models", "/v1/completions", "/v1/chat/completions",
)  # fmt: skip
_BODY_S = 30.0  # within which a body has to arrive


@dataclass
class _Seen:
    """What was seen of an answer as it passed."""

    status: int = 0
    version: str = "-"


class Guard:
    """ASGI middleware around everything: key, host, request id, errors, log line, metrics."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, metrics: Metrics) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics
        self._key = settings.api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, if it may, and note what became of it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        ident = f"req-{uuid.uuid4().hex[:16]}"
        seen = _Seen()

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                seen.status = message["status"]
                headers = MutableHeaders(raw=message["headers"])
                headers["x-request-id"] = ident
                headers["x-content-type-options"] = "nosniff"
                seen.version = headers.get("x-model-version", "-")
                message["headers"] = headers.raw
            await send(message)

        try:
            self._admit(scope)
            await self._app(scope, receive, answer)
        except (ClientDisconnect, OSError):
            pass  # nobody is there to be told
        except Exception as error:
            told = from_exception(error)
            if told.status >= 500 and not isinstance(error, ApiError):
                log_failure(error, ident, self._settings.debug)
            if not seen.status:
                await told.response()(scope, receive, answer)
        finally:
            self._note(scope, ident, seen, time.perf_counter() - began)

    def _admit(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if not self._key:
            # Without a key only this machine may ask, and no web page in a browser on it: a page
            # can give its own name the address 127.0.0.1.
            if not _is_this_machine(headers.get("host", "localhost")):
                raise ApiError(
                    403, "without an API key this server answers as localhost only", "wrong_host"
                )
            return
        if scope["path"] in OPEN:
            return
        kind, _, shown = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not shown.strip():
            raise ApiError(
                401, "an API key is needed: Authorization: Bearer KEY", "missing_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
        if not hmac.compare_digest(shown.strip().encode("utf-8", "surrogateescape"), self._key):
            raise ApiError(
                401, "the API key is wrong", "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip

    def _note(self, scope: Scope, ident: str, seen: _Seen, seconds: float) -> None:
        # Neither query nor unknown paths: there may be anything in them.
        endpoint = scope["path"] if scope["path"] in _ENDPOINTS else "other"
        status = seen.status or 499  # the client left before anything was said
        self._metrics.requests.labels(endpoint, str(status)).inc()
        if status < 400:
            self._metrics.seconds.labels(endpoint).observe(seconds)
        log.info(
            "%s %s %s %.3fs version=%s %s",
            scope["method"] if scope["method"].isalpha() else "?", endpoint, status, seconds,
            seen.version, ident,
        )  # fmt: skip


def _is_this_machine(host: str) -> bool:
    """Whether a Host header, with or without a port, names the loopback."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    try:
        return is_loopback(name.lower())
    except ValueError:
        return False


def log_failure(error: Exception, ident: str, debug: bool) -> None:
    """Say that something went wrong inside, and where, without paths and without what was asked.

    The message of an exception may repeat the request, so only `debug` shows it.
    """
    if debug:
        log.error("%s failed", ident, exc_info=error)
        return
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{Path(frames[-1].filename).stem}:{frames[-1].lineno}" if frames else "?"
    log.error("%s failed: %s in %s", ident, type(error).__name__, where)


async def read_body(request: Request, limit: int) -> bytes:
    """The body of a request.

    Raises:
        ApiError: it is larger than `limit` bytes, or it does not arrive.
    """
    too_large = ApiError(413, f"the body is larger than {limit} bytes", "body_too_large")
    stated = request.headers.get("content-length", "")
    if stated.isdecimal() and int(stated[:20]) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {_BODY_S:g} s", "timeout") from None
    return bytes(body)


def json_only(request: Request) -> None:
    """Let only JSON through: a browser then asks before it sends a page's request elsewhere.

    Raises:
        ApiError: the body is of another kind.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "Content-Type: application/json is needed", "unsupported_media_type")
