"""What OpenAI's protocol adds to a request as HTTP's: the body, which model, and how it is sent.

What a request may ask of the model is decided in `runtime/request.py`, and checked by the model
itself: one set of rules for every endpoint.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from phi3_mlflow.server.errors import ApiError, bad_request


class StreamOptions(BaseModel):
    """`stream_options` of a request."""

    model_config = ConfigDict(extra="ignore", strict=True)

    include_usage: bool | None = None


class Envelope(BaseModel):
    """A request: what the server itself reads, and the rest as it came."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str | None = Field(default=None, max_length=400)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def streamed(self) -> bool:
        """Whether the answer is sent piece by piece."""
        return bool(self.stream)

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def content(self) -> dict[str, Any]:
        """Return the fields that concern the model.

        Raises:
            ApiError: `stream_options` without a stream.
        """
        if self.stream_options is not None and not self.streamed:
            raise bad_request(["stream_options: only with stream: true"])
        return dict(self.model_extra or {})


def read_envelope(body: bytes) -> Envelope:
    """Read the body of a request.

    Raises:
        ApiError: it is no JSON object, or a field of the envelope has the wrong kind of value.
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
        return Envelope.model_validate(content)
    except ValidationError as error:
        # Without the value: messages go into logs of clients.
        raise bad_request(
            [f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in error.errors()]
        ) from None
