"""Log probabilities of the tokens of an answer, in OpenAI's shape."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from .answer import TokenLogprob, TopLogprob


class LogprobCollector:
    """Collects them as the answer is made, and gives each out when its text is shown.

    They are the model's own, before temperature, `top_p` and penalties. Text that could become a
    stop text is held back, and so are its tokens; those of a stop text are never given out.

    Args:
        top: likeliest tokens to report with each one that was chosen.
        spell: the bytes of a token.
    """

    def __init__(self, top: int, spell: Callable[[int], bytes]) -> None:
        self._top = top
        self._spell = spell
        self._held: list[tuple[int, TokenLogprob]] = []
        self._decoded = self._shown = 0

    def note(self, token: int, logits: NDArray[np.float32], decoded: int) -> None:
        """Take the token that was chosen from `logits`, shape (V,), and the length of its text."""
        scaled = logits.astype(np.float64)
        scaled -= scaled.max()
        scaled -= np.log(np.exp(scaled).sum())
        likeliest = np.argpartition(scaled, -self._top)[-self._top :] if self._top else ()
        top = [
            self._entry(int(other), scaled) for other in sorted(likeliest, key=lambda i: -scaled[i])
        ]
        entry: TokenLogprob = {**self._entry(token, scaled), "top_logprobs": top}
        self._decoded += decoded
        self._held.append((self._decoded, entry))

    def shown(self, length: int) -> list[TokenLogprob]:
        """What belongs to the next `length` characters that are shown."""
        self._shown += length
        ready = [entry for end, entry in self._held if end <= self._shown]
        self._held = self._held[len(ready) :]
        return ready

    def _entry(self, token: int, logprobs: NDArray[np.float64]) -> TopLogprob:
        spelled = self._spell(token)
        return {
            "token": spelled.decode("utf-8", "replace"),
            "logprob": float(logprobs[token]),
            "bytes": list(spelled),
        }
