"""Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}` and a status."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
}

_MOST_PROBLEMS, _MOST_CHARACTERS = 20, 500
"""What is told of one request: an answer should not be larger than the question."""


class ApiError(Exception):
    """A request that is answered with an error.

    Attributes:
        status: of HTTP.
        message: for the client; holds nothing of the server's inside.
        code: a word for programs.
        param: the field that is wrong, where there is one.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return the JSON body."""
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, "server_error"),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self, mlflow_shape: bool = False) -> JSONResponse:
        """As a response; with `mlflow_shape` the fields that MLflow's clients read are added."""
        body = self.body()
        if mlflow_shape:
            body |= {"error_code": mlflow_code(self.status), "message": self.message}
        return JSONResponse(body, self.status, self.headers)


def mlflow_code(status: int) -> str:
    """MLflow's word for a status."""
    codes = {401: "UNAUTHENTICATED", 404: "RESOURCE_DOES_NOT_EXIST", 429: "REQUEST_LIMIT_EXCEEDED"}
    if status in codes:
        return codes[status]
    return "INVALID_PARAMETER_VALUE" if 400 <= status < 500 else "INTERNAL_ERROR"


def bad_request(problems: Sequence[str]) -> ApiError:
    """Status 400 for problems that each start with the name of a field and a colon."""
    first = re.match(r"([A-Za-z_][\w.\[\]]*):", problems[0]) if problems else None
    param = first[1] if first else None
    # A model logged by an earlier version tells as many as there are.
    told = [problem[:_MOST_CHARACTERS] for problem in problems[: _MOST_PROBLEMS + 1]]
    if (more := len(problems) - _MOST_PROBLEMS) > 1:
        told[_MOST_PROBLEMS:] = [f"and {more} more problems"]
    text = "; ".join(told)
    too_long = "beyond the context" in text or "leave no room" in text
    return ApiError(400, text, "context_length_exceeded" if too_long else "invalid_value", param)


def from_exception(error: Exception) -> ApiError:
    """What a client is told of an exception: what is wrong with its request, or nothing at all."""
    if isinstance(error, ApiError):
        return error
    # Each logged model brings a `RequestError` of its own, so it is known by what it carries.
    problems = getattr(error, "problems", None)
    if problems:
        return bad_request(list(problems))
    if isinstance(error, MemoryError):
        return ApiError(503, "not enough memory for this request", "out_of_memory")
    return ApiError(500, "the server failed to answer; its log has the kind of error", "internal")
