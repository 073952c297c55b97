"""Requests: what a client may ask for, and errors that name the field when it asks for more.

The field names and their meaning are those of OpenAI's chat completions, as far as MLflow's chat
schema (`mlflow.types.llm.CHAT_MODEL_INPUT_SCHEMA`) has them, and `seed`.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

ROLES = ("system", "user", "assistant")
MAX_TEMPERATURE = 2.0
MAX_CHOICES = 128
MAX_SEED = 2**63 - 1
MAX_TOP_LOGPROBS = 20
# Runs of 64 spaces are a token in some vocabularies, and nothing longer is common: a text with more
# characters than this for every token of the context is refused before it is tokenized.
CHARACTERS_PER_TOKEN = 128


class RequestError(MlflowException):
    """A request that is not answered: every problem found, each starting with its field.

    MLflow's server answers it with status 400 and the message.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems), error_code=INVALID_PARAMETER_VALUE)
        self.problems = list(problems)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. `temperature` 0 takes the likeliest token every time.

    Attributes:
        top_k: 0 keeps every token.
        seed: an integer below 2**63; the same request with the same seed gives the same answer.
    """

    temperature: float
    top_p: float
    top_k: int
    frequency_penalty: float
    presence_penalty: float
    seed: int


@dataclass(frozen=True)
class GenerationRequest:
    """A request that passed validation; `max_tokens` None means the model's default.

    Attributes:
        top_logprobs: how many alternatives to each token are reported with its log probability;
            None reports nothing.
        schema: a JSON schema, as text, that the answer has to follow.
    """

    messages: list[dict[str, str]] | None
    prompt: str | None
    max_tokens: int | None
    stop: tuple[str, ...]
    n: int
    sampling: Sampling
    top_logprobs: int | None = None
    schema: str | None = None


@dataclass(frozen=True)
class SamplingDefaults:
    """What applies where a request says nothing."""

    temperature: float = 0.0
    top_p: float = 1.0


def rows(model_input: Any) -> list[dict[str, Any]]:
    """The requests in what MLflow hands over.

    Args:
        model_input: a DataFrame (MLflow's schema enforcement makes one of any input), a dict, or a
            list of dicts.

    Returns:
        One dict a request, numpy values made plain, absent values (None, NaN) left out.
    """
    if hasattr(model_input, "to_dict") and hasattr(model_input, "columns"):
        records = model_input.to_dict(orient="records")
    elif isinstance(model_input, Mapping):
        records = [model_input]
    elif isinstance(model_input, str):
        records = [{"prompt": model_input}]
    elif isinstance(model_input, Sequence):
        records = [{"prompt": row} if isinstance(row, str) else row for row in model_input]
    else:
        raise RequestError([f"request: expected an object, found {type(model_input).__name__}"])
    for record in records:
        if not isinstance(record, Mapping):
            raise RequestError([f"request: expected an object, found {type(record).__name__}"])
    return [
        {str(key): plain(value) for key, value in record.items() if not _absent(value)}
        for record in records
    ]


def plain(value: Any) -> Any:
    """Numpy scalars and arrays, at any depth, as Python's own numbers and lists."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


class _Fields:
    """The fields of one request, read with checks; problems are collected, not raised."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        self.row = row
        self.problems: list[str] = []

    def number(self, name: str, default: float, low: float, high: float) -> float:
        value = self.row.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.problems.append(f"{name}: expected a number, found {_kind(value)}")
        elif not low <= value <= high:  # false for NaN too
            self.problems.append(f"{name}: {value} is not between {low:g} and {high:g}")
        else:
            return float(value)
        return default

    def whole(self, name: str, default: int | None, low: int, high: int) -> int | None:
        value = self.row.get(name, default)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            self.problems.append(f"{name}: expected a whole number, found {_kind(value)}")
        elif value < low:
            self.problems.append(f"{name}: {value} is below {low}")
        elif value > high:
            self.problems.append(f"{name}: {value} is above {high}")
        else:
            return value
        return default

    def stop(self) -> tuple[str, ...]:
        value = self.row.get("stop", ())
        if isinstance(value, str):
            value = [value]
        if not isinstance(value, list | tuple):
            self.problems.append(f"stop: expected a text or a list of texts, found {_kind(value)}")
            return ()
        for index, text in enumerate(value):
            if not isinstance(text, str) or not text:
                self.problems.append(f"stop[{index}]: expected a text of at least one character")
        return tuple(text for text in value if isinstance(text, str) and text)

    def top_logprobs(self) -> int | None:
        wanted = self.row.get("logprobs")
        if wanted is not None and not isinstance(wanted, bool):
            self.problems.append(f"logprobs: expected true or false, found {_kind(wanted)}")
        top = self.whole("top_logprobs", None, 0, MAX_TOP_LOGPROBS)
        if top and not wanted:
            self.problems.append("top_logprobs: needs logprobs: true")
        return (top or 0) if wanted is True else None

    def schema(self) -> str | None:
        """The JSON schema of `response_format`, as text."""
        wanted = self.row.get("response_format")
        if wanted is None:
            return None
        kind = wanted.get("type") if isinstance(wanted, Mapping) else None
        if kind == "text":
            return None
        if kind == "json_object":
            return '{"type": "object"}'
        if kind != "json_schema":
            self.problems.append(
                "response_format: expected an object whose type is text, json_object or json_schema"
            )
            return None
        about = wanted.get("json_schema")
        schema = about.get("schema") if isinstance(about, Mapping) else None
        if not isinstance(schema, Mapping):
            self.problems.append(
                "response_format.json_schema.schema: expected a JSON schema (an object), found "
                f"{_kind(schema)}"
            )
            return None
        return json.dumps(schema)

    def unsupported(self) -> None:
        if self.row.get("tools"):
            self.problems.append("tools: this model calls no tools; leave the field out")


def parse_chat(
    row: Mapping[str, Any], defaults: SamplingDefaults, context: int
) -> GenerationRequest:
    """Check one chat request.

    Args:
        row: the request's fields; fields that MLflow's chat schema does not know are ignored.
        defaults: what applies where the request says nothing.
        context: tokens the model can hold, prompt and answer together.

    Raises:
        RequestError: naming every field that is wrong.
    """
    fields = _Fields(row)
    messages = _messages(row, fields.problems)
    _fits_roughly([message["content"] for message in messages], "messages", context, fields)
    fields.unsupported()
    return _request(fields, defaults, context, messages=messages, prompt=None)


def parse_prompt(
    row: Mapping[str, Any], defaults: SamplingDefaults, context: int
) -> GenerationRequest:
    """Check one request of the plain contract: `prompt`, and the sampling fields if it has them."""
    fields = _Fields(row)
    prompt = row.get("prompt")
    if not isinstance(prompt, str) or not prompt:
        fields.problems.append(f"prompt: expected a text, found {_kind(prompt)}")
        prompt = ""
    else:
        fields.problems.extend(_text_problems("prompt", prompt))
    _fits_roughly([prompt], "prompt", context, fields)
    return _request(fields, defaults, context, messages=None, prompt=prompt)


def _request(
    fields: _Fields,
    defaults: SamplingDefaults,
    context: int,
    *,
    messages: list[dict[str, str]] | None,
    prompt: str | None,
) -> GenerationRequest:
    temperature = fields.number("temperature", defaults.temperature, 0.0, MAX_TEMPERATURE)
    top_p = fields.number("top_p", defaults.top_p, 0.0, 1.0)
    sampling = Sampling(
        temperature=temperature,
        top_p=top_p,
        top_k=fields.whole("top_k", 0, 0, 2**31 - 1) or 0,
        frequency_penalty=fields.number("frequency_penalty", 0.0, -2.0, 2.0),
        presence_penalty=fields.number("presence_penalty", 0.0, -2.0, 2.0),
        seed=_seed(fields),
    )
    max_tokens = fields.whole("max_tokens", None, 1, context)
    n = fields.whole("n", 1, 1, MAX_CHOICES) or 1
    stop = fields.stop()
    top_logprobs, schema = fields.top_logprobs(), fields.schema()
    if "stream" in fields.row and not isinstance(fields.row["stream"], bool):
        fields.problems.append(
            f"stream: expected true or false, found {_kind(fields.row['stream'])}"
        )
    if fields.problems:
        raise RequestError(fields.problems)
    return GenerationRequest(messages, prompt, max_tokens, stop, n, sampling, top_logprobs, schema)


def _seed(fields: _Fields) -> int:
    """`seed`, or `custom_inputs.seed`: MLflow's chat schema has no column for the former."""
    custom = fields.row.get("custom_inputs")
    if custom is not None and not isinstance(custom, Mapping):
        fields.problems.append(f"custom_inputs: expected an object, found {_kind(custom)}")
    elif custom and "seed" in custom and "seed" not in fields.row:
        value = _Fields({"custom_inputs.seed": custom["seed"]})
        seed = value.whole("custom_inputs.seed", None, 0, MAX_SEED)
        fields.problems.extend(value.problems)
        return secrets.randbits(63) if seed is None else seed
    seed = fields.whole("seed", None, 0, MAX_SEED)
    return secrets.randbits(63) if seed is None else seed


def _messages(row: Mapping[str, Any], problems: list[str]) -> list[dict[str, str]]:
    messages = row.get("messages")
    if not isinstance(messages, list):
        problems.append(f"messages: expected a list of messages, found {_kind(messages)}")
        return []
    if not messages:
        problems.append("messages: the list is empty; at least one message is needed")
    checked = []
    for index, message in enumerate(messages):
        found = list(_message_problems(f"messages[{index}]", message))
        problems.extend(found)
        if not found:
            checked.append({"role": message["role"], "content": message["content"]})
    return checked


def _message_problems(where: str, message: Any) -> Iterator[str]:
    if not isinstance(message, Mapping):
        yield f"{where}: expected an object with role and content, found {_kind(message)}"
        return
    role = message.get("role")
    if role not in ROLES:
        yield f"{where}.role: {_shown(role)} is not one of {', '.join(ROLES)}"
    content = message.get("content")
    if isinstance(content, str):
        yield from _text_problems(f"{where}.content", content)
    else:
        yield f"{where}.content: expected a text, found {_kind(content)}"
    for name in ("refusal", "tool_calls", "tool_call_id"):
        if message.get(name):
            yield f"{where}.{name}: not supported by this model; leave the field out"


def _text_problems(where: str, text: str) -> Iterator[str]:
    at = text.find("\0")
    if at >= 0:
        yield f"{where}: holds a NUL character at position {at}"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        yield f"{where}: holds a lone surrogate (half a character) at position {error.start}"


def _fits_roughly(texts: list[str], field: str, context: int, fields: _Fields) -> None:
    size = sum(len(text) for text in texts)
    if size > context * CHARACTERS_PER_TOKEN:
        fields.problems.append(
            f"{field}: {size} characters of text cannot fit a context of {context} tokens"
        )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _kind(value: Any) -> str:
    names = {
        type(None): "nothing",
        bool: "true or false",
        str: "a text",
        list: "a list",
        dict: "an object",
    }
    kind = names.get(type(value), type(value).__name__)
    return f"{kind} ({_shown(value)})" if isinstance(value, str | int | float) else kind
