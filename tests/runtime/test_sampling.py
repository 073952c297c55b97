from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3_mlflow.runtime.request import Sampling
from phi3_mlflow.runtime.sampling import Sampler


def _sampling(**more: float) -> Sampling:
    plain = {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "seed": 0,
    }
    return Sampling(**{**plain, **more})  # type: ignore[arg-type]


def _logits(size: int = 2000, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, size).astype(np.float32)


def _draws(logits: np.ndarray, count: int, **more: float) -> np.ndarray:
    sampler = Sampler(_sampling(**more))
    return np.array([sampler.choose(logits) for _ in range(count)])


def test_temperature_zero_takes_the_likeliest() -> None:
    logits = _logits()
    assert set(_draws(logits, 5, temperature=0.0)) == {logits.argmax()}
    assert set(_draws(logits, 5, top_k=1)) == {logits.argmax()}
    assert set(_draws(logits, 5, top_p=0.0)) == {logits.argmax()}


def test_a_seed_repeats_and_choices_differ() -> None:
    logits = _logits()
    assert np.array_equal(_draws(logits, 20, seed=7), _draws(logits, 20, seed=7))
    assert not np.array_equal(_draws(logits, 20, seed=7), _draws(logits, 20, seed=8))
    one, other = (Sampler(_sampling(), choice) for choice in (0, 1))
    assert [one.choose(logits) for _ in range(20)] != [other.choose(logits) for _ in range(20)]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_the_softmax_says(temperature: float) -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    drawn = np.bincount(_draws(logits, 4000, temperature=temperature), minlength=4) / 4000
    wanted = np.exp(logits / temperature)
    assert np.abs(drawn - wanted / wanted.sum()).max() < 0.03


@given(
    st.integers(0, 3000), st.floats(0, 1), st.floats(0.01, 2), st.integers(0, 99), st.integers(1, 3)
)
def test_only_tokens_that_top_k_and_top_p_leave_are_drawn(
    top_k: int, top_p: float, temperature: float, seed: int, size: int
) -> None:
    logits = _logits(size * 700, seed)
    drawn = _draws(logits, 5, top_k=top_k, top_p=top_p, temperature=temperature, seed=seed)
    weights = np.exp(logits.astype(np.float64) / temperature - (logits.max() / temperature))
    weights /= weights.sum()
    for token in drawn:
        likelier = weights[weights > weights[token]]
        assert not top_k or len(likelier) < top_k
        assert likelier.sum() <= top_p + 1e-9


def test_penalties_count_what_was_chosen_before() -> None:
    logits = np.array([2.0, 1.5, 0.0], dtype=np.float32)
    before = logits.copy()
    assert list(_draws(logits, 3, temperature=0.0, presence_penalty=1.0)) == [0, 1, 0]
    assert list(_draws(logits, 4, temperature=0.0, frequency_penalty=0.4)) == [0, 0, 1, 0]
    assert np.array_equal(logits, before)
