"""Answers in OpenAI's shape: whole or as a stream of chunks, of a chat or of a text completion.

This is the one place that shapes them: for `predict`, and for a server.
"""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypedDict

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class TopLogprob(TypedDict):
    """A token with its log probability; `bytes` are those of its text."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """The same of a token that was chosen, with the likeliest ones in its place."""

    top_logprobs: list[TopLogprob]


@dataclass
class Choice:
    """One answer, while it is made and when it is finished.

    Attributes:
        text: of the answer.
        tokens: how many tokens the model made for it, the one that ended the turn included.
        finish_reason: `stop` (the model ended its turn, or a stop text came up) or `length`.
        logprobs: of its tokens, when they were asked for.
    """

    text: str = ""
    tokens: int = 0
    finish_reason: str = "length"
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def take_logprobs(self) -> list[TokenLogprob]:
        """Return those that came since this was called last."""
        taken, self.logprobs = self.logprobs, []
        return taken


class AnswerBuilder:
    """Shapes one answer, whole or chunk by chunk: all chunks share an id and a time of creation.

    Args:
        model: the `model` of the answer.
        kind: `chat`, or `text` for the completion of a literal prompt.
        openai: add the fields of OpenAI's answers that MLflow's chat schema does not have
            (`refusal` and `logprobs`).
        logprobs: whether log probabilities were asked for.
    """

    def __init__(
        self,
        model: str,
        kind: Literal["chat", "text"] = "chat",
        *,
        openai: bool = False,
        logprobs: bool = False,
    ) -> None:
        self._chat = kind == "chat"
        self._openai = openai
        self._logprobs = logprobs
        self._offset = 0  # characters of a choice's text so far
        self._head = {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion" if self._chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, choices: Sequence[Choice], prompt_tokens: int) -> dict[str, Any]:
        """Build the answer to a request that is not streamed."""
        return {
            **self._head,
            "choices": [self._whole_choice(at, choice) for at, choice in enumerate(choices)],
            "usage": _usage(prompt_tokens, sum(choice.tokens for choice in choices)),
        }

    def begin(self, index: int) -> dict[str, Any] | None:
        """Begin choice `index` of a stream, with its first chunk if it has one."""
        self._offset = 0
        if not self._chat:
            return None
        return self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, None, None)

    def piece(self, index: int, text: str, logprobs: Sequence[TokenLogprob] = ()) -> dict[str, Any]:
        """Build the chunk for the next piece of choice `index`."""
        said = {"delta": {"content": text}} if self._chat else {"text": text}
        return self._chunk(index, said, None, logprobs)

    def end(self, index: int, reason: str, logprobs: Sequence[TokenLogprob] = ()) -> dict[str, Any]:
        """Build the last chunk of choice `index`, with its finish reason."""
        said: dict[str, Any] = {"delta": {}} if self._chat else {"text": ""}
        return self._chunk(index, said, reason, logprobs or None)

    def usage(self, prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
        """Build the chunk that ends a stream: no choices, the usage of all of them."""
        usage = _usage(prompt_tokens, completion_tokens)
        return {**self._chunk_head(), "choices": [], "usage": usage}

    def _whole_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        self._offset = 0
        shaped: dict[str, Any] = {"index": index}
        if self._chat:
            message: dict[str, Any] = {"role": "assistant", "content": choice.text}
            shaped["message"] = message | ({"refusal": None} if self._openai else {})
        else:
            shaped["text"] = choice.text
        if self._openai:
            shaped["logprobs"] = self._shaped(choice.logprobs) if self._logprobs else None
        return shaped | {"finish_reason": choice.finish_reason}

    def _chunk(
        self,
        index: int,
        said: Mapping[str, Any],
        reason: str | None,
        logprobs: Sequence[TokenLogprob] | None,
    ) -> dict[str, Any]:
        choice = {"index": index, **said, "finish_reason": reason}
        if self._logprobs:
            choice["logprobs"] = None if logprobs is None else self._shaped(logprobs)
        return {**self._chunk_head(), "choices": [choice]}

    def _chunk_head(self) -> dict[str, Any]:
        return self._head | ({"object": "chat.completion.chunk"} if self._chat else {})

    def _shaped(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        if self._chat:
            return {"content": list(logprobs), "refusal": None}
        starts, at = [], self._offset
        for token in logprobs:
            starts.append(at)
            at += len(token["token"])
        self._offset = at
        return {
            "tokens": [token["token"] for token in logprobs],
            "token_logprobs": [token["logprob"] for token in logprobs],
            "top_logprobs": [
                {other["token"]: other["logprob"] for other in token["top_logprobs"]}
                for token in logprobs
            ],
            "text_offset": starts,
        }


def _usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
