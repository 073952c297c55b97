"""Requests: what a client may ask for, and errors that name the field when it asks for more.

The field names and their meaning are those of OpenAI's chat completions, as far as MLflow's chat
schema (`mlflow.types.llm.CHAT_MODEL_INPUT_SCHEMA`) has them, and `seed`.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from .request_fields import RequestFields, kind_of, shown, text_problems

ROLES = ("system", "user", "assistant")
MAX_TEMPERATURE = 2.0
MAX_CHOICES = 128
MAX_SEED = 2**63 - 1
MOST_PROBLEMS = 20
"""That are told of one request: an answer should not be larger than the question."""
MOST_CHARACTERS = 500
"""Of each of them."""
# Runs of 64 spaces are a token in some vocabularies, and nothing longer is common: a text with more
# characters than this for every token of the context is refused before it is tokenized.
CHARACTERS_PER_TOKEN = 128


class RequestError(MlflowException):
    """A request that is not answered: the first problems found, each starting with its field.

    MLflow's server answers it with status 400 and the message.

    Args:
        problems: what is wrong, one sentence each; the first `MOST_PROBLEMS` are told.
        more: how many were found besides.
    """

    def __init__(self, problems: Sequence[str], more: int = 0) -> None:
        told = [problem[:MOST_CHARACTERS] for problem in problems[:MOST_PROBLEMS]]
        more += len(problems) - len(told)
        if more:
            told.append(f"and {more} more problems")
        super().__init__("; ".join(told), error_code=INVALID_PARAMETER_VALUE)
        self.problems = told
        self.count = len(told) - bool(more) + more


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


def input_rows(model_input: Any) -> list[dict[str, Any]]:
    """The requests in what MLflow hands over.

    Args:
        model_input: a DataFrame (MLflow's schema enforcement makes one of any input), a dict, or a
            list of dicts.

    Returns:
        One dict per request, numpy values made plain, absent values (None, NaN) left out.
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
    fields = RequestFields(row)
    messages = _messages(row, context, fields.problems)
    _fits_roughly([message["content"] for message in messages], "messages", context, fields)
    fields.unsupported()
    return _request(fields, defaults, context, messages=messages, prompt=None)


def parse_prompt(
    row: Mapping[str, Any], defaults: SamplingDefaults, context: int
) -> GenerationRequest:
    """Check one request of the plain contract: `prompt`, and the sampling fields if it has them."""
    fields = RequestFields(row)
    prompt = row.get("prompt")
    if not isinstance(prompt, str) or not prompt:
        fields.problems.append(f"prompt: expected a text, found {kind_of(prompt)}")
        prompt = ""
    else:
        fields.problems.extend(text_problems("prompt", prompt))
    _fits_roughly([prompt], "prompt", context, fields)
    return _request(fields, defaults, context, messages=None, prompt=prompt)


def _request(
    fields: RequestFields,
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
    top_logprobs, schema = fields.top_logprobs(), fields.schema(max_tokens or context)
    if "stream" in fields.row and not isinstance(fields.row["stream"], bool):
        fields.problems.append(
            f"stream: expected true or false, found {kind_of(fields.row['stream'])}"
        )
    if fields.problems:
        raise RequestError(fields.problems)
    return GenerationRequest(messages, prompt, max_tokens, stop, n, sampling, top_logprobs, schema)


def _seed(fields: RequestFields) -> int:
    """`seed`, or `custom_inputs.seed`: MLflow's chat schema has no column for the former."""
    custom = fields.row.get("custom_inputs")
    if custom is not None and not isinstance(custom, Mapping):
        fields.problems.append(f"custom_inputs: expected an object, found {kind_of(custom)}")
    elif custom and custom.get("seed") is not None and "seed" not in fields.row:
        value = RequestFields({"custom_inputs.seed": custom["seed"]})
        seed = value.whole("custom_inputs.seed", None, 0, MAX_SEED)
        fields.problems.extend(value.problems)
        return secrets.randbits(63) if seed is None else seed
    seed = fields.whole("seed", None, 0, MAX_SEED)
    return secrets.randbits(63) if seed is None else seed


def _messages(row: Mapping[str, Any], context: int, problems: list[str]) -> list[dict[str, str]]:
    messages = row.get("messages")
    if not isinstance(messages, list):
        problems.append(f"messages: expected a list of messages, found {kind_of(messages)}")
        return []
    if not messages:
        problems.append("messages: the list is empty; at least one message is needed")
    if len(messages) > context:  # each takes a token at least; nobody reads on
        problems.append(
            f"messages: {len(messages)} of them cannot fit a context of {context} tokens"
        )
        return []
    checked = []
    for index, message in enumerate(messages):
        found = list(_message_problems(f"messages[{index}]", message))
        problems.extend(found)
        if not found:
            checked.append({"role": message["role"], "content": message["content"]})
    return checked


def _message_problems(where: str, message: Any) -> Iterator[str]:
    if not isinstance(message, Mapping):
        yield f"{where}: expected an object with role and content, found {kind_of(message)}"
        return
    role = message.get("role")
    if role not in ROLES:
        yield f"{where}.role: {shown(role)} is not one of {', '.join(ROLES)}"
    content = message.get("content")
    if isinstance(content, str):
        yield from text_problems(f"{where}.content", content)
    elif isinstance(content, list):
        yield from _part_problems(f"{where}.content", content)
    else:
        yield f"{where}.content: expected a text, found {kind_of(content)}"
    for name in ("refusal", "tool_calls", "tool_call_id"):
        if message.get(name):
            yield f"{where}.{name}: not supported by this model; leave the field out"


def _part_problems(where: str, parts: list[Any]) -> Iterator[str]:
    """What is wrong with a content of parts, all of which would have to be texts."""
    kinds = [part.get("type") if isinstance(part, Mapping) else None for part in parts]
    for index, kind in enumerate(kinds):
        if isinstance(kind, str) and kind != "text":
            yield (
                f"{where}: expected a text, found a part of type {shown(kind)} at [{index}]; this "
                "model takes text only"
            )
            return
    yield f"{where}: expected a text, found {kind_of(parts)}"


def _fits_roughly(texts: list[str], field: str, context: int, fields: RequestFields) -> None:
    size = sum(len(text) for text in texts)
    if size > context * CHARACTERS_PER_TOKEN:
        fields.problems.append(
            f"{field}: {size} characters of text cannot fit a context of {context} tokens"
        )
