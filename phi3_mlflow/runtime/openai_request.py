"""OpenAI's requests in the terms of the contracts that `request` checks.

OpenAI's protocol spells some things differently, and has fields that change the answer and that no
model here can honour: those are refused rather than ignored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .plain_messages import plain_messages
from .request import RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping

UNSUPPORTED = (
    "functions", "function_call", "logit_bias", "audio", "modalities", "prediction",
    "web_search_options",
)  # fmt: skip
MAX_PROMPTS = 128
"""Texts in one request, as many as choices of one prompt."""
_NOTHING: tuple[Any, ...] = (None, [], {}, ["text"])


def chat_row(content: Mapping[str, Any]) -> dict[str, Any]:
    """Write a request of `/v1/chat/completions` as a row of the chat contract.

    Args:
        content: the fields of the request.

    Raises:
        RequestError: naming every field that is not supported.
    """
    row, problems = dict(content), _unsupported(content, UNSUPPORTED)
    row["messages"] = plain_messages(row.get("messages"))
    limit = row.pop("max_completion_tokens", None)
    if limit is not None:
        if row.get("max_tokens") is not None:
            problems.append("max_completion_tokens: give it or max_tokens, not both")
        row["max_tokens"] = limit
    if row.get("tool_choice") == "none":  # what the client says that the model is not to use
        row.pop("tools", None)
    if row.get("tool_choice") in ("none", "auto"):
        del row["tool_choice"]
    if problems:
        raise RequestError(problems)
    return row


def completion_rows(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Write a request of `/v1/completions` as rows of the prompt contract, one for each prompt.

    Args:
        content: the fields of the request.

    Raises:
        RequestError: naming every field that is not supported.
    """
    prompts = content.get("prompt")
    if not isinstance(prompts, list) or not all(isinstance(one, str) for one in prompts):
        return [completion_row(content)]
    if not prompts:
        raise RequestError(["prompt: the list is empty; at least one text is needed"])
    if len(prompts) > MAX_PROMPTS:
        raise RequestError([f"prompt: {len(prompts)} texts, at most {MAX_PROMPTS} are taken"])
    choices = content.get("n")
    if isinstance(choices, int) and choices * len(prompts) > MAX_PROMPTS:
        raise RequestError(
            [f"n: {choices} for each of {len(prompts)} prompts, at most {MAX_PROMPTS} in all"]
        )
    return [completion_row({**content, "prompt": prompt}) for prompt in prompts]


def completion_row(content: Mapping[str, Any]) -> dict[str, Any]:
    """Write a request of `/v1/completions` with one prompt as a row of the prompt contract.

    The prompt is literal: control tokens in it are what they are.

    Args:
        content: the fields of the request.

    Raises:
        RequestError: naming every field that is not supported.
    """
    row, problems = dict(content), _unsupported(content, UNSUPPORTED)
    problems += [_refusal(name) for name in ("echo", "suffix") if row.pop(name, None)]
    if row.pop("best_of", None) not in (None, 1, row.get("n")):
        problems.append(_refusal("best_of"))
    prompt = row.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
        row["prompt"] = prompt[0]
    elif isinstance(prompt, list):
        problems.append("prompt: a text or a list of texts is needed; tokens are not taken")
    if problems:
        raise RequestError(problems)
    top = row.pop("logprobs", None)
    if top is not None:
        row |= {"logprobs": True, "top_logprobs": top}
    return row


def _unsupported(content: Mapping[str, Any], names: tuple[str, ...]) -> list[str]:
    return [_refusal(name) for name in names if content.get(name) not in _NOTHING]


def _refusal(name: str) -> str:
    return f"{name}: not supported by this model; leave the field out"
