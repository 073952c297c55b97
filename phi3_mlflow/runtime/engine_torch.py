"""The engine over transformers and torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .adapter import add_adapter
from .fair_lock import FairLock
from .request import RequestError
from .tokens import ChatTokenizer, Tokenizing

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from .engine import EngineSettings, Guided


class TorchEngine(Tokenizing):
    """A Hugging Face checkpoint.

    Args:
        checkpoint: directory with config.json and the weights as safetensors.
        tokenizer: directory with the tokenizer and its chat template.
        settings: how to set the engine up.
        adapter: directory with a LoRA adapter for the checkpoint.

    Raises:
        ValueError: a setting that this installation or this model cannot meet.
    """

    together = 1

    def __init__(
        self,
        checkpoint: Path,
        tokenizer: Path,
        settings: EngineSettings,
        adapter: Path | None = None,
    ) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        if settings.provider == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                "model_config provider: the installed torch has no CUDA; take provider 'cpu'"
            )
        if settings.provider not in ("cpu", "cuda"):
            raise ValueError(
                f"model_config provider: {settings.provider!r} is neither 'cpu' nor 'cuda'"
            )
        dtype = getattr(torch, settings.dtype, None) if settings.dtype else "auto"
        if dtype != "auto" and not isinstance(dtype, torch.dtype):
            raise ValueError(
                f"model_config dtype: {settings.dtype!r} is not a number type of torch"
            )
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.lock = FairLock()
        model: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=dtype, local_files_only=True, use_safetensors=True
        )
        if adapter is not None:
            add_adapter(model, adapter)
        self._model = model.to(settings.provider).eval()
        config = self._model.config
        made_for = int(config.max_position_embeddings)
        if settings.max_context > made_for:
            raise ValueError(
                f"model_config max_context: {settings.max_context} is beyond the {made_for} tokens "
                "that the model was made for"
            )
        self.context = settings.max_context or made_for
        self.rope_switch = settings.rope_switch or _rope_switch(config)
        heads = config.num_key_value_heads or config.num_attention_heads
        head_size = (
            getattr(config, "head_dim", 0) or config.hidden_size // config.num_attention_heads
        )
        self.token_bytes = (
            2 * config.num_hidden_layers * heads * head_size * self._model.dtype.itemsize
        )
        ends = self._model.generation_config.eos_token_id
        ends = config.eos_token_id if ends is None else ends  # 0 is a token
        listed = ends if isinstance(ends, list) else [ends]
        named = {int(end) for end in listed if end is not None}
        self._tokenizer = ChatTokenizer(tokenizer, named)
        end = self._tokenizer.end
        self.ends: frozenset[int] = frozenset(named if end is None else named | {end})

    def knows(self, schema: str) -> bool:
        """Whether `try_schema` answers at once."""
        return True

    def try_schema(self, schema: str) -> None:
        """Nothing is tried: `open_guided` refuses every schema."""

    def open_guided(self, capacity: int, schema: str) -> Guided:
        """Refuse: transformers cannot hold an answer to a JSON schema.

        Raises:
            RequestError: always.
        """
        raise RequestError(
            [
                "response_format: the transformers flavor cannot hold an answer to a JSON schema; "
                "the onnx flavor can"
            ]
        )

    def open(self, capacity: int) -> TorchSession:
        """Open an empty session that counts as `capacity` tokens."""
        return TorchSession(self._model, capacity, self.rope_switch)


class TorchSession:
    """A key-value cache. It grows as it is used, and `capacity` is only what it is counted as."""

    shared = False

    def __init__(self, model: Any, capacity: int, rope_switch: int) -> None:
        self.capacity = self.room = capacity
        # A cache with a sliding window forgets what has left the window, and cannot be rewound.
        self.reusable = model.config.get_text_config().sliding_window is None
        self._model = model
        self._rope_switch = rope_switch
        self._tokens: list[int] = []
        self._cache = self._empty()
        self._logits: NDArray[np.float32] = np.empty(0, dtype=np.float32)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens and compute."""
        import torch

        new, switch = list(tokens), self._rope_switch
        if 0 < len(self._tokens) <= switch < len(self._tokens) + len(new):
            # LongRoPE: every position is computed again, with the long factors.
            new, self._tokens, self._cache = self._tokens + new, [], self._empty()
        with torch.inference_mode():
            output = self._model(
                input_ids=torch.tensor([new], device=self._model.device),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
            self._logits = output.logits[0, -1].float().cpu().numpy()
        self._tokens += new
        self.reusable = self.reusable and not 0 < switch < len(self._tokens)

    def logits(self) -> NDArray[np.float32]:
        """Return the logits of the token that follows, shape (V,), float32."""
        return self._logits

    def follow(self, token: int | None) -> int:
        """Append `token`, if there is one, and choose the likeliest one after it."""
        if token is not None:
            self.extend([token])
        return int(self._logits.argmax())

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        if length == 0:
            self._cache = self._empty()
        elif length < len(self._tokens):
            self._cache.crop(length - len(self._tokens))  # below zero: tokens to remove
        del self._tokens[length:]

    def rest(self, length: int) -> None:
        """Nothing to do: the cache is kept, or let go, as a whole."""

    def _empty(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self._model.config)


def _rope_switch(config: Any) -> int:
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) != "longrope":
        return 0
    original = getattr(config, "original_max_position_embeddings", None)
    return int(original or rope.get("original_max_position_embeddings") or 0)
