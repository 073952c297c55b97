"""An engine that says what it is told to, for tests of what happens around the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from phi3_mlflow.runtime.answerer import Answerer
from phi3_mlflow.runtime.fair_lock import FairLock
from phi3_mlflow.runtime.model_config import ModelConfig
from phi3_mlflow.runtime.python_model import ChatPythonModel
from phi3_mlflow.runtime.request import RequestError

END = 1


class ScriptedEngine:
    """Tokens are characters (code point + 10); the answer to a prompt is the script, then the end.

    Args:
        script: the answer's text, or nothing for one that never ends.
        on_extend: called with the tokens of every piece of work.
    """

    context = 200
    ends = frozenset({END})
    token_bytes = 1024
    rope_switch = 0
    together = 1

    def __init__(
        self, script: str = "", on_extend: Callable[[Sequence[int]], None] | None = None
    ) -> None:
        self.script = script
        self.on_extend = on_extend or (lambda tokens: None)
        self.opened = 0
        self.lock = FairLock()

    def render(self, messages: list[dict[str, str]]) -> list[int]:
        return [
            token
            for message in messages
            for token in [*self.encode(message["role"][0] + message["content"]), END]
        ]

    def encode(self, text: str) -> list[int]:
        return [ord(letter) + 10 for letter in text]

    def decoder(self) -> Callable[[int], str]:
        return lambda token: chr(token - 10)

    def spell(self, token: int) -> bytes:
        return chr(token - 10).encode()

    def knows(self, schema: str) -> bool:
        return True

    def try_schema(self, schema: str) -> None:
        pass

    def open_guided(self, capacity: int, schema: str) -> ScriptedSession:
        raise RequestError(["response_format: a script follows no schema"])

    def open(self, capacity: int) -> ScriptedSession:
        self.opened += 1
        return ScriptedSession(self, capacity)


class ScriptedSession:
    reusable = True
    shared = False

    def __init__(self, engine: ScriptedEngine, capacity: int) -> None:
        self.engine = engine
        self.capacity = self.room = capacity
        self.tokens: list[int] = []
        self.spoken = 0

    def extend(self, tokens: Sequence[int]) -> None:
        self.engine.on_extend(tokens)
        self.tokens += tokens
        assert len(self.tokens) <= self.capacity
        self.spoken = self.spoken + 1 if len(tokens) == 1 else 0

    def logits(self) -> np.ndarray:
        script = self.engine.script
        logits = np.zeros(400, dtype=np.float32)
        if not script:
            logits[ord("a") + 10] = 9
        else:
            at = self.spoken
            logits[ord(script[at]) + 10 if at < len(script) else END] = 9
        return logits

    def follow(self, token: int | None) -> int:
        if token is not None:
            self.extend([token])
        return int(self.logits().argmax())

    def rewind(self, length: int) -> None:
        assert length <= len(self.tokens)
        del self.tokens[length:]
        self.spoken = 0

    def rest(self, length: int) -> None:
        pass


def model_on(engine: Any, contract: str = "chat", **config: Any) -> ChatPythonModel:
    """A model on an engine, as if it had been loaded."""
    made = ChatPythonModel(contract)
    made.answerer = Answerer(engine, ModelConfig.read(config))
    return made
