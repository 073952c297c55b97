"""Addresses: whose they are, where a redirect may lead, and how to show them without secrets."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

from phi3_mlflow.core.errors import EnvironmentProblem

if TYPE_CHECKING:
    import httpx


def origin(url: str) -> tuple[str, str, int]:
    """Scheme, host and port: what a token is given to.

    Raises:
        ValueError: the address cannot be read.
    """
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return parts.scheme, (parts.hostname or "").lower(), port


def shown(url: str) -> str:
    """An address to show: a signed one carries its signature in the query, which is left out."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def redirect_target(response: httpx.Response, what: str) -> str:
    """Where a redirect leads.

    Raises:
        EnvironmentProblem: nowhere, or to where it must not be followed.
    """
    location: str | None = response.headers.get("Location")
    if not location:
        raise EnvironmentProblem(f"{what}: a redirect that does not say where to")
    try:
        target = urljoin(str(response.url), location)
        scheme = origin(target)[0]
    except ValueError:
        raise EnvironmentProblem(f"{what}: a redirect to an unreadable address") from None
    if scheme not in ("http", "https"):
        raise EnvironmentProblem(f"{what}: a redirect to {scheme or 'no'} scheme is not followed")
    if response.url.scheme == "https" and scheme != "https":
        raise EnvironmentProblem(f"{what}: a redirect from https to http is not followed")
    return target


def keep_secrets_out_of_logs() -> None:
    """Let the HTTP libraries log no signed address and nothing that a server sends."""
    names = ("httpx", *(f"httpcore.{part}" for part in ("connection", "http11", "http2", "proxy")))
    for logger in map(logging.getLogger, names):
        if not any(isinstance(known, _NothingSecret) for known in logger.filters):
            logger.addFilter(_NothingSecret())


class _NothingSecret(logging.Filter):
    """What httpx and httpcore log holds signed addresses and whatever a server sends back."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name.startswith("httpcore"):
            record.msg, record.args = record.getMessage().partition(" ")[0], ()
        elif isinstance(record.args, tuple):
            record.args = tuple(
                shown(str(arg)) if type(arg).__name__ == "URL" else arg for arg in record.args
            )
        return True
