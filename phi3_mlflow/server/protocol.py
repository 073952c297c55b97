"""OpenAI's requests, as far as they go beyond the chat contract, and its answers.

What a request may ask of the model is checked by the model itself (`flavors/serving/request.py`
within it): one set of rules for every door. Here is only what OpenAI's protocol adds to them.
"""

from __future__ import annotations

import json
import time
import uuid
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from phi3_mlflow.server.errors import ApiError, bad_request

# Fields of OpenAI's that change the answer and that no model here can honour.
UNSUPPORTED = (
    "functions", "function_call", "logit_bias", "audio", "modalities", "prediction",
    "web_search_options",
)  # fmt: skip
_DEFAULTS: tuple[Any, ...] = (None, [], {}, ["text"])


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    include_usage: bool = False


class _Asked(BaseModel):
    """What both kinds of request have; what the model itself checks is kept as it came."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str | None = Field(default=None, max_length=400)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def streamed(self) -> bool:
        return bool(self.stream)

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def rest(self) -> dict[str, Any]:
        """The fields that the model checks."""
        problems = [
            f"{name}: not supported by this model; leave the field out"
            for name in UNSUPPORTED
            if (self.model_extra or {}).get(name) not in _DEFAULTS
        ]
        if self.stream_options is not None and not self.streamed:
            problems.append("stream_options: only with stream: true")
        if problems:
            raise bad_request(problems)
        return dict(self.model_extra or {})


class ChatRequest(_Asked):
    """`POST /v1/chat/completions`."""

    messages: Any = None
    max_completion_tokens: Any = None

    def row(self) -> dict[str, Any]:
        """The request in the terms of the chat contract."""
        row = self.rest() | {"messages": _plain_messages(self.messages)}
        if self.max_completion_tokens is not None:
            if row.get("max_tokens") is not None:
                raise bad_request(["max_completion_tokens: give it or max_tokens, not both"])
            row["max_tokens"] = self.max_completion_tokens
        if row.get("tool_choice") in ("none", "auto"):
            del row["tool_choice"]
        return row


class TextRequest(_Asked):
    """`POST /v1/completions`: a literal prompt, in which control tokens are what they are."""

    prompt: Any = None
    logprobs: Any = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None

    def row(self) -> dict[str, Any]:
        """The request in the terms of the plain contract, and of the chat contract's logprobs."""
        row, problems = self.rest(), []
        for name in ("echo", "suffix"):
            if getattr(self, name):
                problems.append(f"{name}: not supported by this model; leave the field out")
        if self.best_of not in (None, 1, row.get("n")):
            problems.append("best_of: not supported by this model; leave the field out")
        prompt = self.prompt
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
            prompt = prompt[0]
        elif isinstance(prompt, list):
            problems.append("prompt: one text is needed; lists of texts or tokens are not taken")
            prompt = "-"
        if problems:
            raise bad_request(problems)
        row["prompt"] = prompt
        if self.logprobs is not None:
            row |= {"logprobs": True, "top_logprobs": self.logprobs}
        return row


def parse(kind: type[ChatRequest] | type[TextRequest], body: bytes) -> Any:
    """Read the body of a request.

    Raises:
        ApiError: it is no JSON object, or a field of OpenAI's has the wrong kind of value.
    """
    try:
        # Python's reader, because pydantic's refuses what RFC 8259 allows: lone surrogates in
        # escapes. The model's own rules then name the field that holds one.
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not valid JSON", "invalid_json") from None
    if not isinstance(content, dict):
        raise ApiError(400, "the body has to be a JSON object", "invalid_json")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        # Without the value: messages go into logs of clients.
        raise bad_request(
            [f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in error.errors()]
        ) from None


def _plain_messages(messages: Any) -> Any:
    """OpenAI's spellings of what the contract has: text parts, and the role `developer`."""
    if not isinstance(messages, list):
        return messages
    return [_plain_message(message) for message in messages]


def _plain_message(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    plain = dict(message)
    if plain.get("role") == "developer":
        plain["role"] = "system"
    parts = plain.get("content")
    if isinstance(parts, list) and parts and all(_is_text(part) for part in parts):
        plain["content"] = "".join(part["text"] for part in parts)
    return plain


def _is_text(part: Any) -> bool:
    return (
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    )


class Answer:
    """Shapes the parts of one answer, as a stream of chunks or whole.

    Args:
        kind: `chat` or `text`.
        model: the `model` of the answer.
        logprobs: whether they were asked for.
    """

    def __init__(self, kind: Literal["chat", "text"], model: str, logprobs: bool) -> None:
        self._chat = kind == "chat"
        self._logprobs = logprobs
        self._offset = 0  # characters of a choice's text so far
        name = "chatcmpl" if self._chat else "cmpl"
        self._head = {
            "id": f"{name}-{uuid.uuid4().hex}",
            "object": "chat.completion" if self._chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def begin(self, index: int) -> dict[str, Any] | None:
        """Begin a choice, with its first chunk if it has one."""
        self._offset = 0
        if not self._chat:
            return None
        return self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, None, None)

    def piece(self, index: int, text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        said = {"delta": {"content": text}} if self._chat else {"text": text}
        return self._chunk(index, said, None, logprobs)

    def end(self, index: int, reason: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        said: dict[str, Any] = {"delta": {}} if self._chat else {"text": ""}
        return self._chunk(index, said, reason, logprobs or None)

    def usage(self, prompt: int, made: int) -> dict[str, Any]:
        """The chunk that ends a stream for which the usage was asked."""
        return {**self._chunk_head(), "choices": [], "usage": usage(prompt, made)}

    def whole(
        self, choices: list[tuple[str, str, list[dict[str, Any]]]], prompt: int, made: int
    ) -> dict[str, Any]:
        """The whole answer from (text, finish reason, log probabilities) of each choice."""
        shaped = []
        for index, (text, reason, tokens) in enumerate(choices):
            self._offset = 0
            said: dict[str, Any] = {"text": text}
            if self._chat:
                said = {"message": {"role": "assistant", "content": text, "refusal": None}}
            logprobs = self._shaped_logprobs(tokens) if self._logprobs else None
            shaped.append({"index": index, **said, "logprobs": logprobs, "finish_reason": reason})
        return {**self._head, "choices": shaped, "usage": usage(prompt, made)}

    def _chunk(
        self, index: int, said: dict[str, Any], reason: str | None, logprobs: Any
    ) -> dict[str, Any]:
        choice = {"index": index, **said, "finish_reason": reason}
        if self._logprobs:
            choice["logprobs"] = self._shaped_logprobs(logprobs) if logprobs is not None else None
        return {**self._chunk_head(), "choices": [choice]}

    def _chunk_head(self) -> dict[str, Any]:
        return self._head | ({"object": "chat.completion.chunk"} if self._chat else {})

    def _shaped_logprobs(self, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        if self._chat:
            return {"content": logprobs, "refusal": None}
        starts, at = [], self._offset
        for chance in logprobs:
            starts.append(at)
            at += len(chance["token"])
        self._offset = at
        return {
            "tokens": [chance["token"] for chance in logprobs],
            "token_logprobs": [chance["logprob"] for chance in logprobs],
            "top_logprobs": [
                {other["token"]: other["logprob"] for other in chance["top_logprobs"]}
                for chance in logprobs
            ],
            "text_offset": starts,
        }


def usage(prompt: int, made: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
