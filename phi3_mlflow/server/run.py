"""Running the server: uvicorn, signals, and what is said at the beginning and the end."""

from __future__ import annotations

import logging
import signal
import socket
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import uvicorn

from phi3_mlflow.core.errors import EnvironmentProblem
from phi3_mlflow.server.connections import LimitedConnection

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    from fastapi import FastAPI

    from phi3_mlflow.server.settings import ServerSettings


class Server(uvicorn.Server):
    """uvicorn's server, ending with code 0 when it is told to stop.

    The first SIGINT or SIGTERM lets running answers finish, the second one does not.
    """

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        if self.started:
            self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop after the running answers; at the second signal at once."""
        self.force_exit = self.should_exit
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM while the server runs, without raising them again."""
        before = {
            number: signal.signal(number, self.handle_exit)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def run(app: FastAPI, settings: ServerSettings, ready: Callable[[str], None]) -> None:
    """Serve until a signal comes; running answers are finished first.

    Args:
        app: the application.
        settings: where to listen, and how long answers may take.
        ready: called with the address when the server listens.

    Raises:
        EnvironmentProblem: the address cannot be listened on.
    """
    logging_to_stderr()
    config = uvicorn.Config(
        app,
        http=LimitedConnection,
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=int(settings.limit_s) + 5,
        h11_max_incomplete_event_size=64 * 1024,
    )
    try:
        listening = _listen(settings)
    except OSError as error:
        raise EnvironmentProblem(
            f"cannot listen on {settings.host} port {settings.port}: {error.strerror}. "
            "Is another server running there? `-P port=0` takes a free one"
        ) from error
    host, port = listening.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    try:
        Server(config, lambda: ready(address)).run([listening])
    finally:
        app.state.context.queue.abandon_all()
        listening.close()


def _listen(settings: ServerSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((settings.host, settings.port))
    except OSError:
        listening.close()
        raise
    return listening


def logging_to_stderr() -> None:
    """The server's own log as lines with a time; libraries are heard from warnings on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name, level in (("phi3_mlflow.server", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level)
        logger.propagate = False
    # Its remarks on how requests were written are for the client, not for this log.
    logging.getLogger("mlflow.pyfunc.scoring_server").setLevel(logging.ERROR)
