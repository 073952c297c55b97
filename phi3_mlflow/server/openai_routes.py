"""`/v1/chat/completions`, `/v1/completions` and `/v1/models`."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any, Literal, TypeGuard, cast

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from phi3_mlflow.runtime.answer import AnswerBuilder, Choice, TokenLogprob
from phi3_mlflow.runtime.openai_request import chat_row, completion_rows
from phi3_mlflow.runtime.request import RequestError
from phi3_mlflow.runtime.request_fields import RequestFields
from phi3_mlflow.server.errors import ApiError, from_exception
from phi3_mlflow.server.exchange import ClientLeft, Exchange, RequestStats
from phi3_mlflow.server.guard import json_only, log_failure, read_body
from phi3_mlflow.server.protocol import read_envelope

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from phi3_mlflow.server.backend import BackendPart, BackendReply
    from phi3_mlflow.server.context import ServerContext
    from phi3_mlflow.server.holder import Loaded

_ANY_ROOM = 8192
"""Tokens of an answer, for a model that does not say how many it can hold."""
_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
Kind = Literal["chat", "text"]


def router(context: ServerContext) -> APIRouter:
    """Make the routes of OpenAI's protocol."""
    routes = APIRouter()

    @routes.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await _answer(context, request, "chat")

    @routes.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _answer(context, request, "text")

    @routes.get("/v1/models")
    async def models() -> Response:
        loaded = context.holder.current
        data = {"object": "list", "data": [_described(loaded)]}
        return JSONResponse(data, headers=version_of(loaded))

    @routes.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        loaded = context.holder.current
        _check_name(context, loaded, name)
        return JSONResponse(_described(loaded), headers=version_of(loaded))

    return routes


def _described(loaded: Loaded) -> dict[str, Any]:
    return {
        "id": loaded.name,
        "object": "model",
        "created": int(loaded.since),
        "owned_by": "phi3-mlflow",
        "version": loaded.version,
    }


def _check_name(context: ServerContext, loaded: Loaded, name: str) -> None:
    """Raise ApiError unless the model that is served goes by a name."""
    if name not in (loaded.name, loaded.target.uri, context.uri):
        raise ApiError(
            404, f"there is no model of that name here; this is {loaded.name}", "model_not_found",
            "model",
        )  # fmt: skip


def version_of(loaded: Loaded) -> dict[str, str]:
    """Return the header that says which version answers."""
    return {"x-model-version": loaded.version}


async def _answer(context: ServerContext, request: Request, kind: Kind) -> Response:
    json_only(request)
    body = await read_body(request, context.settings.body_limit)
    # Reading a megabyte of JSON takes long enough to be felt by others' streams.
    asked = await asyncio.to_thread(read_envelope, body)
    loaded = context.holder.current
    if asked.model is not None:
        _check_name(context, loaded, asked.model)
    content = asked.content()
    row, wanted = await asyncio.to_thread(_read, loaded, content, kind)
    await context.vetting.vet(loaded.backend, wanted)

    def done(stats: RequestStats) -> None:
        if stats.outcome == "rejected":  # a full queue is no time to write traces
            return
        context.tracer.write(request.url.path, loaded.name, stats, row, "".join(exchange.said))

    exchange = Exchange(context.queue, request, loaded, done)
    try:
        await exchange.begin(exchange.answer_with(*wanted))
        results = exchange.results()
        reply = await anext(results)  # or the error of a prompt that does not fit
        answer = AnswerBuilder(loaded.name, kind, openai=True, logprobs=bool(row.get("logprobs")))
        if asked.streamed:
            events = _events(context, exchange, results, reply, answer, asked.with_usage)
            return StreamingResponse(
                events, headers=_STREAM_HEADERS | version_of(loaded), media_type="text/event-stream"
            )
        whole = await _whole(results, reply, answer)
    except ClientLeft:
        exchange.close()
        return Response(status_code=499)
    except BaseException:
        exchange.close()
        raise
    return JSONResponse(whole, headers=version_of(loaded))


def _read(loaded: Loaded, content: dict[str, Any], kind: Kind) -> tuple[dict[str, Any], list[Any]]:
    """Check a request, outside of the event loop: others' streams go on meanwhile.

    Returns:
        The request as the model takes it, the first of several; and all of them, checked.
    """
    if kind == "chat":
        row = chat_row(content)
        _check_schema(row, getattr(loaded.backend, "context", 0))
        return row, [loaded.backend.parse(row, "chat")]
    rows = completion_rows(content)
    return rows[0], [loaded.backend.parse(row, "prompt") for row in rows]


def _check_schema(row: dict[str, Any], context: int) -> None:
    """Refuse a JSON schema that would end the server, whatever version logged the model.

    Raises:
        RequestError: it is too large, or demands more than an answer can hold.
    """
    fields = RequestFields(row)
    limit = row.get("max_tokens")
    room = limit if isinstance(limit, int) and limit > 0 else context or _ANY_ROOM
    text = fields.schema(min(room, context or _ANY_ROOM))
    if fields.problems:
        raise RequestError(fields.problems)
    if text is not None:
        schema = {"name": "answer", "schema": json.loads(text)}
        row["response_format"] = {"type": "json_schema", "json_schema": schema}


async def _whole(
    results: AsyncIterator[BackendPart | BackendReply], reply: BackendReply, answer: AnswerBuilder
) -> dict[str, Any]:
    choices: list[Choice] = []
    texts: list[str] = []
    logprobs: list[TokenLogprob] = []
    prompt_tokens = reply.prompt_tokens
    async for part in results:
        if not _is_part(part):
            prompt_tokens += cast("BackendReply", part).prompt_tokens
            continue
        texts.append(part.text)
        logprobs += part.logprobs
        if part.finish_reason:
            choices.append(Choice("".join(texts), part.tokens, part.finish_reason, logprobs))
            texts, logprobs = [], []
    return answer.whole(choices, prompt_tokens)


def _is_part(result: BackendPart | BackendReply) -> TypeGuard[BackendPart]:
    """Whether it is a piece of an answer, not the beginning of the next prompt's."""
    return hasattr(result, "finish_reason")


async def _events(
    context: ServerContext,
    exchange: Exchange,
    results: AsyncIterator[BackendPart | BackendReply],
    reply: BackendReply,
    answer: AnswerBuilder,
    with_usage: bool,
) -> AsyncIterator[bytes]:
    """The answer as server-sent events."""
    begun, first_choice = -1, 0
    replies = [reply]
    try:
        async for part in results:
            if not _is_part(part):
                replies.append(cast("BackendReply", part))
                first_choice = begun + 1
                continue
            index = first_choice + part.index
            if index > begun:
                begun = index
                if first := answer.begin(index):
                    yield _event(first)
            if part.finish_reason:
                yield _event(answer.end(index, part.finish_reason, part.logprobs))
            else:
                yield _event(answer.piece(index, part.text, part.logprobs))
        if with_usage:
            asked, made = (
                sum(getattr(one, name) for one in replies) for name in ("prompt_tokens", "tokens")
            )
            yield _event(answer.usage(asked, made))
        yield b"data: [DONE]\n\n"
    except ClientLeft:
        return
    except Exception as error:  # the status is out: the client reads the error in the stream
        if not isinstance(error, ApiError):
            log_failure(error, "a stream", context.settings.debug)
        yield _event(from_exception(error).body())
    finally:
        exchange.close()


def _event(content: dict[str, Any]) -> bytes:
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()
