"""Choosing the next token from the logits, the same way for every engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .request import Sampling

# Sorting a whole vocabulary costs more than the forward pass of a small model; the likeliest tokens
# nearly always hold the mass that top_p asks for.
_CANDIDATES = 512
# More than logits and noise can differ by, little enough for float32 to keep their differences.
_AHEAD = 1000.0


class Sampler:
    """Chooses the tokens of one answer; holds its random numbers and the counts for penalties.

    Args:
        sampling: what the request asked for.
        choice: number of the answer among the `n` of a request; each draws its own numbers.
    """

    def __init__(self, sampling: Sampling, choice: int = 0) -> None:
        self._sampling = sampling
        self._random = np.random.default_rng([sampling.seed, choice])
        self._counts: dict[int, int] = {}
        penalties = sampling.frequency_penalty or sampling.presence_penalty
        self.greedy = not penalties and (sampling.temperature == 0 or sampling.top_k == 1)
        """Whether it always is the likeliest token."""

    def choose(self, logits: NDArray[np.float32]) -> int:
        """The next token.

        Args:
            logits: one float per token of the vocabulary, shape (V,); not changed.
        """
        sampling = self._sampling
        logits = self._penalized(logits)
        if sampling.temperature == 0 or sampling.top_k == 1:
            token = int(logits.argmax())
        else:
            token = self._draw(logits)
        self.count(token)
        return token

    def count(self, token: int) -> None:
        """Take note of a token of the answer that was chosen by `scores`."""
        self._counts[token] = self._counts.get(token, 0) + 1

    def scores(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scores whose largest, among the tokens that somebody else allows, is the next token.

        With Gumbel noise on the logits the largest is a draw from their distribution, whatever
        tokens it is limited to (the Gumbel-max trick). Tokens outside `top_k` and `top_p` are put
        behind all others: one of them comes only when no other is allowed.

        Args:
            logits: shape (V,); not changed.

        Returns:
            Shape (V,), float32.
        """
        sampling = self._sampling
        logits = self._penalized(logits)
        if sampling.temperature == 0 or sampling.top_k == 1:
            return logits.astype(np.float32)
        scaled = logits.astype(np.float64) / sampling.temperature
        scaled -= scaled.max()
        noisy = scaled + self._random.gumbel(size=len(scaled))
        if sampling.top_k or sampling.top_p < 1:
            weights = np.exp(scaled)
            tokens = _likeliest(weights / weights.sum(), sampling.top_k, sampling.top_p)
            noisy[tokens] += _AHEAD
        return noisy.astype(np.float32)

    def _penalized(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        sampling = self._sampling
        if self._counts and (sampling.frequency_penalty or sampling.presence_penalty):
            logits = logits.astype(np.float32, copy=True)
            seen = np.fromiter(self._counts, dtype=np.int64)
            times = np.fromiter(self._counts.values(), dtype=np.float32)
            logits[seen] -= sampling.frequency_penalty * times + sampling.presence_penalty
        return logits

    def _draw(self, logits: NDArray[np.float32]) -> int:
        sampling = self._sampling
        scaled = logits.astype(np.float64) / sampling.temperature
        scaled -= scaled.max()
        weights = np.exp(scaled)
        weights /= weights.sum()
        if sampling.top_k or sampling.top_p < 1:
            tokens = _likeliest(weights, sampling.top_k, sampling.top_p)
            weights = weights[tokens]
        else:
            tokens = None
        cumulated = np.cumsum(weights)
        at = int(np.searchsorted(cumulated, self._random.random() * cumulated[-1], side="right"))
        at = min(at, len(weights) - 1)
        return at if tokens is None else int(tokens[at])


def _likeliest(weights: NDArray[np.float64], top_k: int, top_p: float) -> NDArray[np.int64]:
    """Tokens from the likeliest down: at most `top_k`, and no more than reach the mass `top_p`."""
    size = len(weights)
    wanted = min(top_k or size, size)
    first = min(wanted, _CANDIDATES)
    while True:
        tokens = np.argpartition(weights, size - first)[size - first :] if first < size else None
        tokens = np.arange(size) if tokens is None else tokens
        tokens = tokens[np.lexsort((tokens, -weights[tokens]))]
        mass = np.cumsum(weights[tokens])
        if first >= wanted or mass[-1] >= top_p:
            break
        first = wanted
    if top_p < 1:
        tokens = tokens[: int(np.searchsorted(mass, top_p, side="left")) + 1]
    likeliest: NDArray[np.int64] = tokens
    return likeliest
