"""What the routes of one server share."""

from __future__ import annotations

from dataclasses import dataclass

from phi3_mlflow.server.exchange import Desk
from phi3_mlflow.server.holder import Holder
from phi3_mlflow.server.metrics import Metrics
from phi3_mlflow.server.settings import Settings
from phi3_mlflow.server.tracing import Tracer


@dataclass(frozen=True)
class Context:
    """`uri` is the model URI that the server was started with."""

    settings: Settings
    uri: str
    holder: Holder
    desk: Desk
    metrics: Metrics
    tracer: Tracer
