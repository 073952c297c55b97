from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3_mlflow.evaluation.divergence import MOST_ROWS, batches, compare, windows


class Table:
    """A model whose next-token distribution is a row of a table."""

    def __init__(self, table: np.ndarray) -> None:
        self.table = np.asarray(table, dtype=np.float32)

    def logits(self, pieces: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [self.table[tokens] for tokens in pieces]


def test_a_model_does_not_differ_from_itself() -> None:
    model = Table(np.random.default_rng(0).normal(size=(8, 8)))
    metrics = compare(model, model, [("t", [1, 2, 3, 4, 5])], 16).metrics()
    assert metrics["kl_mean"] == 0
    assert metrics["top1_agreement"] == 1
    assert metrics["perplexity_ratio"] == 1
    assert metrics["scored_tokens"] == 4


def test_figures_agree_with_those_worked_out_by_hand() -> None:
    p = np.log([[0.5, 0.5], [0.25, 0.75]])
    q = np.log([[0.25, 0.75], [0.5, 0.5]])
    metrics = compare(Table(p), Table(q), [("t", [0, 1, 1])], 16).metrics()
    first = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    second = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert metrics["kl_mean"] == pytest.approx((first + second) / 2, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx((1 / (0.75 * 0.5)) ** 0.5, rel=1e-5)
    assert metrics["perplexity_reference"] == pytest.approx((1 / (0.5 * 0.75)) ** 0.5, rel=1e-5)


@given(st.integers(0, 2**31), st.integers(2, 12))
def test_divergence_is_never_negative_and_pieces_add_up(seed: int, window: int) -> None:
    random = np.random.default_rng(seed)
    one, other = (Table(random.normal(size=(6, 6)) * 3) for _ in range(2))
    text = random.integers(0, 6, size=20).tolist()
    metrics = compare(one, other, [("t", text)], window).metrics()
    assert metrics["kl_mean"] >= 0
    assert 0 <= metrics["top1_agreement"] <= 1
    assert metrics["scored_tokens"] == sum(len(w) - 1 for w in windows(text, window))


def test_a_padded_vocabulary_is_left_out() -> None:
    p = np.zeros((4, 4))
    q = np.zeros((4, 6))
    metrics = compare(Table(p), Table(q), [("t", [0, 1, 2])], 8).metrics()
    assert metrics["perplexity_reference"] == pytest.approx(4)


@pytest.mark.parametrize("length", [0, 1])
def test_a_text_too_short_to_predict_anything_is_left_out(length: int) -> None:
    assert list(windows(list(range(length)), 8)) == []


@given(st.integers(0, 2**31), st.integers(2, 9), st.integers(0, 40))
@settings(deadline=None)
def test_batches_score_what_one_at_a_time_scores(seed: int, window: int, room: int) -> None:
    random = np.random.default_rng(seed)
    one, other = (Table(random.normal(size=(6, 6))) for _ in range(2))
    texts = [(f"t{i}", random.integers(0, 6, size=size).tolist()) for i, size in enumerate((9, 4))]
    alone = compare(one, other, texts, window)
    together = compare(one, other, texts, window, batch_tokens=room)
    for a, b in zip(alone.scores, together.scores, strict=True):
        assert (a.text_id, a.places, a.agreements) == (b.text_id, b.places, b.agreements)
        assert a.kl == pytest.approx(b.kl)
        assert a.candidate_nll == pytest.approx(b.candidate_nll)


@given(st.lists(st.integers(1, 50), max_size=99), st.integers(0, 120))
def test_every_piece_is_in_one_batch_that_fits(lengths: list[int], room: int) -> None:
    groups = list(batches(lengths, room))
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) <= MOST_ROWS
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= room
