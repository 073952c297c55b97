"""What the server was started with, checked."""

from __future__ import annotations

import ipaddress
import os
import re
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from phi3_mlflow.core.errors import UserError, problem_list

if TYPE_CHECKING:
    from collections.abc import Mapping

KEY_VARIABLE = "PHI3_MLFLOW_API_KEY"
DEBUG_VARIABLE = "PHI3_MLFLOW_SERVE_DEBUG"
LEAST_KEY_LENGTH = 16

Trace = Literal["off", "figures", "full"]


class ServerSettings(BaseModel):
    """How the server behaves.

    Attributes:
        host, port: where it listens; port 0 takes any free one.
        running: requests that are answered at the same time.
        batch: of these, how many are computed together, if the model can; 1: they take turns.
        waiting: requests that may wait for their beginning; more are answered with 429.
        limit_s: seconds a request may take, its wait included.
        body_limit: bytes of a request's body.
        trace: MLflow traces of requests: none, without the texts, or with them.
        api_key: what clients have to show; empty: nothing. Never logged.
        debug: tracebacks in the log.
        follow_s: seconds between looks at where the alias points.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    running: int = Field(default=8, ge=1)
    batch: int = Field(default=8, ge=1)
    waiting: int = Field(default=32, ge=0)
    limit_s: float = Field(default=300.0, gt=0)
    body_limit: int = Field(default=1_000_000, gt=0)
    trace: Trace = "off"
    api_key: str = Field(default="", repr=False)
    debug: bool = False
    follow_s: float = Field(default=5.0, gt=0)

    @property
    def loopback_only(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)

    @classmethod
    def read(
        cls, given: Mapping[str, str], environment: Mapping[str, str] | None = None
    ) -> ServerSettings:
        """From the entry point's parameters (texts) and the environment.

        Raises:
            UserError: naming all that is wrong, and the way out.
        """
        environment = os.environ if environment is None else environment
        problems: list[str] = []

        def whole(name: str, low: int, high: int) -> int:
            text = given[name].strip()
            value = int(text) if re.fullmatch(r"\d{1,9}", text) else -1
            if not low <= value <= high:
                problems.append(
                    f"parameter: {name} = {text!r}: a whole number from {low} to {high} is needed"
                )
            return value

        host, key = given["host"].strip(), environment.get(KEY_VARIABLE, "")
        try:
            loopback = is_loopback(host)
        except ValueError:
            problems.append(f"parameter: host = {host!r}: an IP address, or localhost")
            loopback = True
        if not loopback and not key:
            problems.append(
                f"host {host} can be reached from other machines, and there is no API key. Set "
                f"{KEY_VARIABLE} in the server's environment (a random one: "
                "python -c 'import secrets; print(secrets.token_urlsafe(32))'), "
                "or listen on 127.0.0.1"
            )
        if key and (len(key) < LEAST_KEY_LENGTH or not key.isascii() or key.strip() != key):
            problems.append(
                f"{KEY_VARIABLE}: at least {LEAST_KEY_LENGTH} ASCII characters are needed, with no "
                "space around them"
            )
        running = whole("running", 1, 64)
        batch = running if given["batch"].strip() in ("", "auto") else whole("batch", 1, 64)
        values = {
            "host": host,
            "port": whole("port", 0, 65535),
            "running": running,
            "batch": batch,
            "waiting": whole("waiting", 0, 10_000),
            "limit_s": whole("request_limit_s", 1, 86_400),
            "body_limit": whole("body_limit_kb", 1, 1_000_000) * 1000,
            "trace": given["trace"],
            "api_key": key,
            "debug": environment.get(DEBUG_VARIABLE, "").lower() in ("1", "true", "yes"),
        }
        if problems:
            raise UserError(problem_list("The server cannot be started like this", problems))
        return cls.model_validate(values)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address.

    Raises:
        ValueError: it is neither an IP address nor `localhost`.
    """
    return host == "localhost" or ipaddress.ip_address(host).is_loopback
