"""One item of an evaluation or calibration set, as a row of a file holds it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from phi3_mlflow.evaluation.checks import Check, StrictModel, Text

Identifier = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,99}$")]


class Message(StrictModel):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Text


def _conversation(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    if not messages or messages[-1].role != "user":
        raise ValueError("the last message should have the role 'user': it is what is answered")
    if any(message.role == "system" for message in messages[1:]):
        raise ValueError("the role 'system' is allowed in the first message only")
    return messages


class Question(StrictModel):
    """One question with a checkable answer; `quick` marks the subset of a quick run."""

    id: Identifier
    category: Identifier
    messages: tuple[Message, ...]
    check: Check
    max_tokens: Annotated[int, Field(ge=1, le=4096)] = 64
    level: Literal["easy", "medium", "hard"] = "medium"
    quick: bool = False

    _ends_with_user = field_validator("messages")(_conversation)


class HeldoutText(StrictModel):
    """One document for perplexity and divergence."""

    id: Identifier
    register_: Annotated[Identifier, Field(alias="register")] = "other"
    text: Text
    quick: bool = False


class CalibrationText(StrictModel):
    """One calibration text, as plain `text` or as a conversation in `messages`."""

    id: Identifier
    register_: Annotated[Identifier, Field(alias="register")] = "other"
    text: Text | None = None
    messages: Annotated[tuple[Message, ...], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> CalibrationText:
        if (self.text is None) == (self.messages is None):
            raise ValueError("should have exactly one of 'text' and 'messages'")
        return self


class Needle(StrictModel):
    """A recipe for a long prompt with one sentence to find in it; see `build_needle_prompt`."""

    id: Identifier
    target_tokens: Annotated[int, Field(ge=100, le=1_000_000)]
    depth: Annotated[float, Field(ge=0, le=1)]
    needle: Text
    question: Text
    check: Check
    max_tokens: Annotated[int, Field(ge=1, le=4096)] = 32
    quick: bool = False
