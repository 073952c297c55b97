"""Several rows in one sequence: none sees another, the loss is the same, nothing is lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phi3_mlflow.training.packing import Pack, PackCollator, pack, tokens_in
from phi3_mlflow.training.tokens import IGNORED
from phi3_mlflow.training.train import as_dataset
from tests.fixtures.tiny_phi3 import ARCHITECTURES, make_tiny
from tests.training.test_train import Heard, Tokens, rows, run, settings


def row(length: int, start: int = 5) -> Tokens:
    mask = (0, *(1 for _ in range(length - 1)))
    return Tokens(tuple(range(start, start + length)), mask)


@given(st.lists(st.integers(2, 40), max_size=40))
def test_every_row_is_in_one_sequence_and_none_is_too_long(lengths: list[int]) -> None:
    given_rows = [row(length, 100 * number) for number, length in enumerate(lengths)]
    packs = pack(given_rows, 40)
    assert all(sum(one.lengths) == len(one.input_ids) <= 40 for one in packs)
    found = []
    for one in packs:
        at = 0
        for length in one.lengths:
            found.append((one.input_ids[at : at + length], one.loss_mask[at : at + length]))
            at += length
    assert sorted(found) == sorted((r.input_ids, r.loss_mask) for r in given_rows)
    assert pack(given_rows, 40) == packs
    # No two sequences would fit into one.
    filled = sorted(len(one.input_ids) for one in packs)
    assert len(filled) < 2 or filled[0] + filled[1] > 40


def test_the_first_token_of_a_row_carries_no_loss() -> None:
    one = Pack.of([Tokens((1, 2), (1, 1)), Tokens((3, 4, 5), (1, 0, 1))])
    assert one.loss_mask == (0, 1, 0, 0, 1)


@given(st.lists(st.lists(st.integers(2, 9), min_size=1, max_size=5), min_size=1, max_size=4))
def test_positions_begin_again_and_padding_counts_for_nothing(batch: list[list[int]]) -> None:
    packs = [Pack.of([row(length) for length in lengths]) for lengths in batch]
    made = PackCollator(7)([*as_dataset(packs)])
    assert {tensor.shape for tensor in made.values()} == {
        (len(batch), max(len(one.input_ids) for one in packs))
    }
    assert int(tokens_in(made["position_ids"])) == sum(map(sum, batch))
    for number, one in enumerate(packs):
        length = len(one.input_ids)
        assert made["input_ids"][number, :length].tolist() == list(one.input_ids)
        assert set(made["labels"][number, length:].tolist()) <= {IGNORED}
        expected = [place for row_length in one.lengths for place in range(row_length)]
        assert made["position_ids"][number, :length].tolist() == expected


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_a_model_says_of_a_row_is_the_same_in_a_sequence(
    architecture: str, attention: str, tmp_path: Any
) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_tiny(tmp_path / "checkpoint", architecture)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    )
    given_rows = rows(7)
    packs = pack(given_rows, 40)
    batch = PackCollator(0)([*as_dataset(packs)])
    with torch.no_grad():
        logits = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits
        alone = {
            one.input_ids: model(input_ids=torch.tensor([one.input_ids])).logits[0]
            for one in given_rows
        }
    for number, one in enumerate(packs):
        at = 0
        for length in one.lengths:
            expected = alone[one.input_ids[at : at + length]]
            torch.testing.assert_close(
                logits[number, at : at + length], expected, rtol=1e-4, atol=1e-4
            )
            at += length
    assert any(len(one.lengths) > 1 for one in packs)


def test_a_step_on_packed_rows_has_the_loss_of_the_same_rows(
    tmp_path_factory: Any, tmp_path: Any
) -> None:
    checkpoint = make_tiny(tmp_path_factory.mktemp("tiny") / "checkpoint")
    same = {"lora_dropout": 0, "num_train_epochs": 3, "save_steps": 9, "max_length": 40}
    alone, packed = Heard(), Heard()
    # Every row in every step, so that their order is of no account.
    run(checkpoint, tmp_path / "1", settings(per_device_train_batch_size=20, **same), alone)
    chosen = settings(per_device_train_batch_size=len(pack(rows(20), 40)), packing=True, **same)
    run(checkpoint, tmp_path / "2", chosen, packed)
    assert packed.began == alone.began == [(0, 3)]
    for name in ("loss", "grad_norm", "validation_loss"):
        assert packed.of(name) == pytest.approx(alone.of(name), rel=2e-4)
    again = run(checkpoint, tmp_path / "3", chosen)
    assert again.adapter_sha256 == run(checkpoint, tmp_path / "2", chosen).adapter_sha256
