"""MLflow's own protocol: `/invocations`, `/ping`, `/health`, `/version`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response

from phi3_mlflow.server.errors import ApiError, from_exception
from phi3_mlflow.server.exchange import ClientLeft, Exchange
from phi3_mlflow.server.guard import log_failure, read_body
from phi3_mlflow.server.openai_routes import version_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlflow.pyfunc import PyFuncModel

    from phi3_mlflow.server.context import ServerContext

_KINDS = ("application/json", "text/csv")
MOST_ROWS = 1000
"""In one request."""
_MOST_CHARACTERS = 10_000
"""Of what a client is told is wrong."""


def router(context: ServerContext) -> APIRouter:
    """Make the routes of MLflow's protocol."""
    routes = APIRouter()

    @routes.get("/ping")
    @routes.get("/health")
    async def ping() -> Response:
        return PlainTextResponse("\n", headers=version_of(context.holder.current))

    @routes.get("/version")
    async def version() -> Response:
        import mlflow

        return PlainTextResponse(mlflow.__version__)

    @routes.post("/invocations")
    async def invocations(request: Request) -> Response:
        try:
            return await _invoke(context, request)
        except Exception as error:
            told = from_exception(error)
            if told.status >= 500 and not isinstance(error, ApiError):
                log_failure(error, "an invocation", context.settings.debug)
            return told.response(mlflow_shape=True)

    return routes


async def _invoke(context: ServerContext, request: Request) -> Response:
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() not in _KINDS:
        raise ApiError(
            415, f"Content-Type: one of {', '.join(_KINDS)} is needed", "unsupported_media_type"
        )
    body = await read_body(request, context.settings.body_limit)
    loaded = context.holder.current
    if loaded.model is None:
        raise ApiError(404, "this model has no pyfunc interface", "unsupported")
    model = loaded.model

    def work(hand_over: Callable[[Any], None]) -> None:
        hand_over(_predict(model, body, kind))

    exchange = Exchange(context.queue, request, loaded)
    try:
        await exchange.begin(work)
        (answer,) = [result async for result in exchange.results()]
    except ClientLeft:
        return Response(status_code=499)
    finally:
        exchange.close()
    return Response(answer, media_type="application/json", headers=version_of(loaded))


def _predict(model: PyFuncModel, body: bytes, kind: str) -> str:
    """Answer as `mlflow models serve` does, with MLflow's own reading and writing of tables.

    Raises:
        ApiError: with what MLflow or the model has to say about the request.
        Exception: what went wrong in the model.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.pyfunc import scoring_server

    _refuse_many_rows(body, kind)
    heard = _Listening(model)
    server: Any = scoring_server  # untyped, and so is what it raises
    metadata: Any = model.metadata
    try:
        done = server.invocations(body, kind, heard, metadata.get_input_schema())
    except MlflowException as raised:
        error: Any = raised
        if heard.fault is not None:
            raise heard.fault from None
        status = int(error.get_http_status_code())
        if status >= 500:
            raise
        message = str(heard.message or error.message)
        raise ApiError(status, message[:_MOST_CHARACTERS], "invalid_value") from None
    if done.status != 200:
        raise ApiError(done.status, str(done.response), "unsupported_media_type")
    return str(done.response)


def _refuse_many_rows(body: bytes, kind: str) -> None:
    """Refuse more rows than are worth a request, before MLflow takes seconds to look at them.

    Raises:
        ApiError: there are more than `MOST_ROWS`.
    """
    if kind.partition(";")[0].strip().lower() == "text/csv":
        rows = body.count(b"\n")
    else:
        try:
            content = json.loads(body)
        except (ValueError, RecursionError):
            return  # MLflow says what is wrong with it
        rows = max((_length(value) for value in _tables(content)), default=0)
    if rows > MOST_ROWS:
        raise ApiError(
            413, f"{rows} rows; at most {MOST_ROWS} are taken at once (files of rows: -e score)",
            "too_many_rows",
        )  # fmt: skip


def _tables(content: Any) -> list[Any]:
    """What may hold rows in MLflow's formats of a request."""
    if not isinstance(content, dict):
        return [content]
    found = [content.get(name) for name in ("dataframe_records", "instances", "inputs")]
    split = content.get("dataframe_split")
    return [*found, split.get("data") if isinstance(split, dict) else None]


def _length(value: Any) -> int:
    if isinstance(value, dict):  # columns
        return max((_length(item) for item in value.values()), default=0)
    return len(value) if isinstance(value, list) else 0


class _Listening:
    """A model that remembers what it said: MLflow's server wraps that in the whole request.

    Attributes:
        message: what it had to say about the request, before it was wrapped.
        fault: an exception that says nothing about the request.
    """

    def __init__(self, model: PyFuncModel) -> None:
        self._model = model
        self.metadata = model.metadata
        self.message = ""
        self.fault: Exception | None = None

    def predict(self, data: Any, params: dict[str, Any] | None = None) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            return self._model.predict(data, params=params)
        except MlflowException as error:
            self.message = str(error.message)
            raise
        except Exception as error:
            self.fault = error
            raise
