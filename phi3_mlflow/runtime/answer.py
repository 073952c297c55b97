"""Answers in the shape of OpenAI's chat completions, whole and as a stream of chunks."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Choice:
    """One finished answer.

    Attributes:
        tokens: how many tokens the model made for it, the one that ended the turn included.
        finish_reason: `stop` (the model ended its turn, or a stop text came up) or `length`.
        logprobs: log probabilities of tokens, see `logprobs.LogprobCollector`.
    """

    text: str
    tokens: int
    finish_reason: str
    logprobs: list[dict[str, Any]] = field(default_factory=list)

    def take_logprobs(self) -> list[dict[str, Any]]:
        """Those that came since this was called last."""
        taken, self.logprobs = self.logprobs, []
        return taken


def new_id() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"


def completion(model: str, prompt_tokens: int, choices: list[Choice]) -> dict[str, Any]:
    """The answer to a request that is not streamed."""
    return {
        "id": new_id(),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text},
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(choices)
        ],
        "usage": usage(prompt_tokens, sum(choice.tokens for choice in choices)),
    }


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


class ChunkMaker:
    """Makes the chunks of one streamed answer: they share an id and a time of creation."""

    def __init__(self, model: str) -> None:
        self._head = {
            "id": new_id(),
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model,
        }

    def delta(self, index: int, delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
        """A piece of choice `index`; `finish` is set on its last one."""
        choice = {"index": index, "delta": delta, "finish_reason": finish}
        return {**self._head, "choices": [choice]}

    def last(self, prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
        """The chunk that ends the stream: no choices, the usage of all of them."""
        return {**self._head, "choices": [], "usage": usage(prompt_tokens, completion_tokens)}
