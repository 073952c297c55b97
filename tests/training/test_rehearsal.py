"""Texts to rehearse: the model is held to what it predicted there before it was trained."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phi3_mlflow.core.errors import UserError
from phi3_mlflow.training.rehearsal import PIECE, Rehearsal, read_rehearsal, rehearsal_pieces
from tests.fixtures.tiny_phi3 import make_tiny
from tests.training.test_train import Heard, run, settings

PIECES = [tuple(6 + (i * 11 + j * 5) % 250 for j in range(PIECE - 16 * i)) for i in range(3)]
CHOSEN = {"lora_dropout": 0, "learning_rate": 5e-3, "rehearsal_tokens": PIECE}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("rehearsal") / "checkpoint")


def test_before_training_nothing_has_moved_and_then_it_has(checkpoint: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32),
        LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["qkv_proj", "down_proj"]),
    )
    rehearsal, training = Rehearsal(PIECES, 2, seed=0), model.training
    assert rehearsal.divergence(model, 0).item() == pytest.approx(0, abs=1e-6)
    assert model.training is training
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.add_(0.05)
    found = rehearsal.divergence(model, 0)
    found.backward()
    ids, mask = rehearsal.batch(0)
    with torch.no_grad():
        now = torch.log_softmax(model(input_ids=ids, attention_mask=mask).logits, -1)
        with model.disable_adapter():
            before = torch.log_softmax(model(input_ids=ids, attention_mask=mask).logits, -1)
    each = (before.exp() * (before - now)).sum(-1)[mask.bool()]
    assert found.item() == pytest.approx(each.mean().item(), rel=1e-4)
    assert found.item() > 1e-3
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_the_more_it_counts_the_less_the_model_moves(checkpoint: Path, tmp_path: Path) -> None:
    moved, first = {}, {}
    for weight in (1e-6, 100.0):
        heard = Heard()
        chosen = settings(**CHOSEN, rehearsal_weight=weight)
        run(checkpoint, tmp_path / str(weight), chosen, heard, rehearsal=PIECES)
        moved[weight], first[weight] = heard.of("rehearsal_kl")[-1], heard.of("loss")[0]
    assert moved[100.0] < 0.5 * moved[1e-6]
    alone = Heard()
    run(checkpoint, tmp_path / "alone", settings(**CHOSEN), alone)
    assert first[100.0] == alone.of("loss")[0], "the loss that is told is that of the rows"
    assert not alone.of("rehearsal_kl")


def test_stopped_anywhere_it_ends_with_the_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    chosen = settings(**CHOSEN, gradient_accumulation_steps=2)
    whole = run(checkpoint, tmp_path / "whole", chosen, rehearsal=PIECES)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, tmp_path / "cut", chosen, Heard(stop_at=4), rehearsal=PIECES)
    heard = Heard()
    again = run(checkpoint, tmp_path / "cut", chosen, heard, rehearsal=PIECES)
    assert heard.began[0][0] > 0
    assert again.adapter_sha256 == whole.adapter_sha256
    assert again.curve == whole.curve


@given(st.integers(1, 30), st.integers(1, 8), st.integers(0, 5))
def test_all_pieces_come_round_before_any_comes_again(count: int, each: int, seed: int) -> None:
    rehearsal = Rehearsal([(number + 1,) for number in range(count)], each, seed)
    seen = [i for number in range(3 * count) for i in rehearsal.batch(number)[0].flatten().tolist()]
    rounds = [seen[start : start + count] for start in range(0, len(seen) - count + 1, count)]
    assert all(sorted(one) == list(range(1, count + 1)) for one in rounds)
    assert all(one == other for one, other in pairwise(rounds))


def test_texts_are_cut_and_conversations_written_out(checkpoint: Path, tmp_path: Path) -> None:
    said = [{"role": "user", "content": "a" * 100}, {"role": "assistant", "content": "b" * 50}]
    file = tmp_path / "texts.jsonl"
    rows = [{"text": "x" * (2 * PIECE + 70)}, {"text": "short"}, {"messages": said}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pieces = rehearsal_pieces(checkpoint, read_rehearsal(file))
    assert [len(piece) for piece in pieces[:3]] == [PIECE, PIECE, 70]
    assert len(pieces) == 4, "the short text is left out, the conversation is one piece"
    with pytest.raises(UserError, match=r"train\.rehearsal: no text has 64 tokens"):
        rehearsal_pieces(checkpoint, ["short"])
    file.write_text('{"prompt": "what?"}\n')
    with pytest.raises(UserError, match=r"train\.rehearsal: .*texts\.jsonl, line 1: expected"):
        read_rehearsal(file)
