"""Layer by layer gives what transformers gives for the model as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3_mlflow.checkpoints.reader import CheckpointReader
from phi3_mlflow.core.progress import no_progress
from phi3_mlflow.layers import forward, head, layer, states
from phi3_mlflow.layers.decoder import Decoder
from tests.fixtures.tiny_phi3 import make_tiny

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("phi-3-mini-4k", {"sliding_window": None}),
    "window": ("phi-3-mini-4k", {"sliding_window": 9}),
    "longrope, bfloat16, shards": ("phi-3.5-mini", {}),
    "longrope and window": ("phi-3-mini-128k", {"window": 20}),
    "grouped queries, float16": ("phi-3-medium-4k", {}),
    "one key for all, partial rotary, tied head": ("phi-4-mini", {}),
    "grouped queries, partial rotary, untied": (
        "phi-4-mini",
        {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False},
    ),
    "gelu": ("phi-3-mini-4k", {"hidden_act": "gelu_pytorch_tanh"}),
}
# LongRoPE changes its factors beyond 32 tokens; the windows end at 9 and 20.
LENGTHS = [32, 2, 33, 9, 10, 64, 20, 21, 5]


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture, more = MODELS[request.param]
    return make_tiny(tmp_path_factory.mktemp("model"), architecture, **more)


def whole(checkpoint: Path, pieces: list[torch.Tensor]) -> torch.Tensor:
    """The logits of transformers in float32, piece by piece, one after another."""
    from transformers import Phi3ForCausalLM

    model = Phi3ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.inference_mode():
        return torch.cat([model(piece[None], use_cache=False).logits[0] for piece in pieces])


def streamed(
    checkpoint: Path, pieces: list[torch.Tensor], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    decoder = Decoder(checkpoint, CheckpointReader(checkpoint))
    with no_progress("", None) as meter:
        found = forward.final_states(decoder, pieces, meter, dtype=dtype)
    return head.logits(decoder, found.read(0, found.places), dtype)


def random_pieces(lengths: list[int], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 320, (length,), generator=generator) for length in lengths]


def test_logits_are_those_of_transformers(checkpoint: Path) -> None:
    pieces = random_pieces(LENGTHS)
    torch.testing.assert_close(
        streamed(checkpoint, pieces), whole(checkpoint, pieces), rtol=1e-4, atol=1e-4
    )


def test_a_part_at_a_time_and_in_a_file_gives_the_same(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = random_pieces(LENGTHS)
    expected = streamed(checkpoint, pieces)
    monkeypatch.setattr(layer, "places_together", lambda width: 7)
    monkeypatch.setattr(head, "_CHUNK_BYTES", 4 * 64 * 50)
    monkeypatch.setattr(states.States.__init__, "__kwdefaults__", {"folder": None, "most": 100})
    torch.testing.assert_close(streamed(checkpoint, pieces), expected, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=15)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    seed=st.integers(0, 999),
    data=st.data(),
)
def test_a_text_does_not_depend_on_what_it_is_computed_with(
    plain: Path, lengths: list[int], seed: int, data: st.DataObject
) -> None:
    pieces = random_pieces(lengths, seed)
    index = data.draw(st.integers(0, len(pieces) - 1))
    start = sum(lengths[:index])
    together = streamed(plain, pieces)[start : start + lengths[index]]
    torch.testing.assert_close(together, streamed(plain, [pieces[index]]), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("plain"), "phi-3-mini-128k", window=20)


def test_bfloat16_stays_near(plain: Path) -> None:
    pieces = random_pieces(LENGTHS)
    exact = streamed(plain, pieces).log_softmax(-1)
    near = streamed(plain, pieces, torch.bfloat16).log_softmax(-1)
    kl = (exact.exp() * (exact - near)).sum(-1).mean()
    assert 0 < kl < 0.01


def test_the_meter_is_told_of_all_the_work(plain: Path) -> None:
    class Count:
        total = 0

        def advance(self, amount: int) -> None:
            self.total += amount

    decoder, meter = Decoder(plain, CheckpointReader(plain)), Count()
    forward.final_states(decoder, random_pieces([500, 500]), meter)
    assert meter.total == pytest.approx(forward.work(decoder, 1000), rel=0.001)


@pytest.mark.slow
def test_the_default_says_what_it_says_in_transformers(real_checkpoint: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    pieces = [torch.randint(0, 49152, (n,), generator=generator) for n in (70, 3, 130)]
    found, expected = streamed(real_checkpoint, pieces), whole(real_checkpoint, pieces)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        found.log_softmax(-1), expected.log_softmax(-1), rtol=1e-4, atol=1e-4
    )
