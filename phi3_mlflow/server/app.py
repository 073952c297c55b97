"""The application: its endpoints and its guard, and what begins and ends with it."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from phi3_mlflow.server import mlflow_routes, openai_routes, page
from phi3_mlflow.server.context import ServerContext
from phi3_mlflow.server.errors import ApiError, from_exception
from phi3_mlflow.server.exchange import RequestQueue
from phi3_mlflow.server.guard import Guard
from phi3_mlflow.server.metrics import CONTENT_TYPE, Metrics
from phi3_mlflow.server.tracing import Tracer
from phi3_mlflow.server.vetting import Vetting

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request

    from phi3_mlflow.server.holder import Holder
    from phi3_mlflow.server.settings import ServerSettings


def create_app(settings: ServerSettings, holder: Holder, uri: str) -> FastAPI:
    """Make the server's application.

    Args:
        settings: how it behaves.
        holder: has a model loaded; follows its alias from the application's start to its end.
        uri: the model URI it was started with.
    """
    metrics = Metrics()
    queue = RequestQueue(settings.running, settings.waiting, settings.limit_s, metrics)
    context = ServerContext(
        settings, uri, holder, queue, metrics, Tracer(settings.trace), Vetting()
    )
    _watch(context)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        holder.start()
        yield
        holder.stop()
        context.vetting.close()
        queue.close()
        context.tracer.close()

    app = FastAPI(title="phi3-mlflow", openapi_url=None, lifespan=life)
    app.state.context = context
    app.include_router(openai_routes.router(context))
    app.include_router(mlflow_routes.router(context))
    app.include_router(page.router())

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    async def refuse(request: Request, error: Exception) -> Response:
        return from_exception(error).response()

    async def refuse_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        word = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        told = ApiError(error.status_code, str(error.detail), word, headers=error.headers)
        return told.response()

    app.add_exception_handler(ApiError, refuse)
    app.add_exception_handler(HTTPException, refuse_http)
    app.add_middleware(Guard, settings=settings, metrics=metrics)
    return app


def _watch(context: ServerContext) -> None:
    """Tie the gauges and the model's metrics to what they show."""
    metrics, queue, holder = context.metrics, context.queue, context.holder
    metrics.watch("phi3_running", "Requests being answered", lambda: queue.admission.running)
    metrics.watch("phi3_waiting", "Requests in the queue", lambda: queue.admission.waiting)
    metrics.watch(
        "phi3_prefix_cache_bytes",
        "Key-value cache kept for next turns",
        lambda: holder.current.backend.kept_bytes(),
    )

    def changed(outcome: str) -> None:
        metrics.switches.labels(outcome).inc()
        metrics.model.clear()
        metrics.model.labels(holder.current.name, holder.current.version).set(1)

    metrics.model.labels(holder.current.name, holder.current.version).set(1)
    holder.on_change = changed
