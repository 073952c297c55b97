"""What the routes of one server share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from phi3_mlflow.server.exchange import RequestQueue
    from phi3_mlflow.server.holder import Holder
    from phi3_mlflow.server.metrics import Metrics
    from phi3_mlflow.server.settings import ServerSettings
    from phi3_mlflow.server.tracing import Tracer
    from phi3_mlflow.server.vetting import Vetting


@dataclass(frozen=True)
class ServerContext:
    """`uri` is the model URI that the server was started with."""

    settings: ServerSettings
    uri: str
    holder: Holder
    queue: RequestQueue
    metrics: Metrics
    tracer: Tracer
    vetting: Vetting
