"""Connections that are opened and not used: each has a time, and there are only so many.

uvicorn waits for the head of a request for ever, and takes connections until the process has no
file descriptors left; then nobody is answered. The body has a time of its own (`guard.read_body`).
"""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING, Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

if TYPE_CHECKING:
    import asyncio

HEAD_S = 15.0
"""Within which the head of a request has to arrive, from its first byte or the connection on."""
_MOST = 1000
_DESCRIPTORS_KEPT = 64
"""For what else a server has open: the model's files, the database, the log."""


def most_connections() -> int:
    """Connections that are taken at once, by what the system lets a process have open."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed == resource.RLIM_INFINITY:
        return _MOST
    return max(8, min(_MOST, allowed - _DESCRIPTORS_KEPT))


class LimitedConnection(H11Protocol):
    """uvicorn's HTTP/1.1 with a limit of connections, and a time for the head of a request."""

    head_s: ClassVar[float] = HEAD_S
    most: ClassVar[int | None] = None

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, or say that there are too many."""
        super().connection_made(transport)
        if len(self.connections) > (self.most or most_connections()):
            self._refuse(503, "too many connections; come again")
            return
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        """Take bytes in; the time begins anew with the first of a further request."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()  # the head is here
        elif self._head_timer is None and self.conn.trailing_data[0]:
            self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait_for_head(self) -> None:
        self._head_timer = self.loop.call_later(self.head_s, self._too_slow)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _too_slow(self) -> None:
        self._head_timer = None
        self._refuse(408, "no request arrived in time")

    def _refuse(self, status: int, why: str) -> None:
        if self.transport.is_closing():
            return
        body = f"{why}\n".encode()
        phrase = {408: "Request Timeout", 503: "Service Unavailable"}[status]
        head = (
            f"HTTP/1.1 {status} {phrase}\r\nContent-Type: text/plain\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
