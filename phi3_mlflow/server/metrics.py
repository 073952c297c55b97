"""Prometheus metrics of the server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from collections.abc import Callable

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_RATES = (1, 2, 5, 10, 20, 30, 50, 75, 100, 150, 250)


class Metrics:
    """All metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "phi3_requests", "Requests by endpoint and status", ["endpoint", "status"],
            registry=self.registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "phi3_request_seconds", "Duration of answered requests, their wait included",
            ["endpoint"], buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.first_token = Histogram(
            "phi3_time_to_first_token_seconds", "From the request to the first piece of its answer",
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.rate = Histogram(
            "phi3_tokens_per_second", "Of an answer, from its first token on", buckets=_RATES,
            registry=self.registry,
        )  # fmt: skip
        self.tokens = Counter(
            "phi3_tokens", "Tokens read and made", ["kind", "version"], registry=self.registry
        )
        self.cancelled = Counter(
            "phi3_cancelled", "Requests whose client went away", registry=self.registry
        )
        self.timed_out = Counter(
            "phi3_timed_out", "Requests that took longer than allowed", registry=self.registry
        )
        self.switches = Counter(
            "phi3_model_changes", "Looks at the alias that had consequences", ["outcome"],
            registry=self.registry,
        )  # fmt: skip
        self.model = Gauge(
            "phi3_model_info", "The model that answers now", ["name", "version"],
            registry=self.registry,
        )  # fmt: skip

    def watch(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A gauge that is read when somebody asks."""
        Gauge(name, text, registry=self.registry).set_function(read)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
