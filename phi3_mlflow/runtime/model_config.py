"""The values of `model_config` that a logged model knows, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .engine import EngineSettings

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class ModelConfig:
    """Every `model_config` value, with what applies when it is not given.

    All of them are written into the logged model, because MLflow lets a value be overridden at
    load time only if it is there.

    Attributes:
        model_name: the `model` of every answer.
        threads, max_context, provider, rope_switch, kv_cache, dtype, batch: see
            `engine.EngineSettings`.
        max_tokens: new tokens at most, for requests that say nothing.
        temperature, top_p: for requests that say nothing; temperature 0 is greedy.
        prefix_cache_mb: megabytes of key-value cache kept for the next turn; 0 keeps nothing.
        prefill_chunk: tokens of a prompt that are computed before another request gets its turn.
    """

    model_name: str = "phi-3"
    threads: int = 0
    max_context: int = 0
    provider: str = "cpu"
    rope_switch: int = 0
    kv_cache: str = "float32"
    dtype: str = ""
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    prefix_cache_mb: int = 2048
    prefill_chunk: int = 64
    batch: int = 1

    @classmethod
    def read(cls, values: Mapping[str, Any] | None) -> ModelConfig:
        """Check `model_config`.

        Raises:
            ValueError: naming every value that is unknown or of the wrong kind.
        """
        values = dict(values or {})
        known = cls.__dataclass_fields__
        problems = [f"{name}: no such value" for name in values if name not in known]
        for name in known:
            if name not in values:
                continue
            default, value = getattr(cls, name), values[name]
            kind = (int, float) if isinstance(default, float) else type(default)
            if isinstance(value, bool) or not isinstance(value, kind):
                problems.append(f"{name}: expected {type(default).__name__}, found {value!r}")
            elif isinstance(value, int | float) and value < (1 if name in _POSITIVE else 0):
                problems.append(f"{name}: {value} is too small")
        if problems:
            raise ValueError("model_config: " + "; ".join(problems))
        return cls(**values)

    @property
    def engine(self) -> EngineSettings:
        """The values that concern the engine."""
        return EngineSettings(
            threads=self.threads,
            max_context=self.max_context,
            provider=self.provider,
            rope_switch=self.rope_switch,
            kv_cache=self.kv_cache,
            dtype=self.dtype,
            batch=self.batch,
        )


_POSITIVE = ("max_tokens", "prefill_chunk", "batch")
