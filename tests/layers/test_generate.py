"""Texts continued together, matrix by matrix, go on as transformers alone would go on."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3_mlflow.checkpoints.reader import CheckpointReader
from phi3_mlflow.core.errors import CheckpointRefused
from phi3_mlflow.layers import generate, product
from phi3_mlflow.layers.decoder import Decoder
from phi3_mlflow.layers.generate import Generation, Prompt, Text, token_bytes
from tests.fixtures.tiny_phi3 import make_tiny
from tests.layers.test_forward import MODELS

ENOUGH = 1 << 30


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture, more = MODELS[request.param]
    return make_tiny(tmp_path_factory.mktemp("model"), architecture, **more)


@pytest.fixture(scope="module")
def longrope(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LongRoPE that changes beyond 32 tokens, and a window of 20."""
    return make_tiny(tmp_path_factory.mktemp("longrope"), "phi-3-mini-128k", window=20)


def prompts(lengths: Sequence[int], most: int = 12, seed: int = 0) -> list[Prompt]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Prompt(torch.randint(0, 320, (length,), generator=generator).tolist(), most)
        for length in lengths
    ]


# The answers cross the windows (9, 20) and the switch of LongRoPE (32); some prompts are beyond.
PROMPTS = prompts([1, 5, 15, 27, 32, 33, 40, 70, 3, 8])


def alone(checkpoint: Path, some: Sequence[Prompt], ends: Sequence[int]) -> list[list[int]]:
    """What transformers makes of each prompt, all of it computed anew for every token."""
    from transformers import Phi3ForCausalLM

    model = Phi3ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    found = []
    for prompt in some:
        tokens = list(prompt.tokens)
        while len(tokens) < prompt.places:
            with torch.inference_mode():
                logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
            if int(logits.argmax()) in ends:
                break
            tokens.append(int(logits.argmax()))
        found.append(tokens[len(prompt.tokens) :])
    return found


def together(
    checkpoint: Path, some: Sequence[Prompt], ends: Sequence[int], room: int = ENOUGH
) -> list[list[int]]:
    """The same by passes over all of them."""
    generation = Generation(Decoder(checkpoint, CheckpointReader(checkpoint)), some, ends, room)
    return [list(text.made) for text in finished(generation)]


def finished(generation: Generation) -> list[Text]:
    found: list[Text] = []
    while parts := generation.take_up():
        found += generation.run(parts, lambda share: None)
    return sorted(found, key=lambda text: text.number)


def ends_of(made: Sequence[Sequence[int]]) -> list[int]:
    """Tokens that end some of the texts early, and others not."""
    return [made[1][4], made[6][2]]


def test_answers_are_those_of_transformers(checkpoint: Path) -> None:
    free = together(checkpoint, PROMPTS, [])
    assert free == alone(checkpoint, PROMPTS, [])
    assert all(len(made) == 12 for made in free)
    ends = ends_of(free)
    early = together(checkpoint, PROMPTS, ends)
    assert early == alone(checkpoint, PROMPTS, ends)
    assert len({len(made) for made in early}) > 1, "some end before others"


@pytest.mark.parametrize("passed", [3, 7, 64])
def test_prompts_in_pieces_and_rows_in_pieces_change_nothing(
    checkpoint: Path, passed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = together(checkpoint, PROMPTS, [])
    monkeypatch.setattr(generate, "PASS_PLACES", passed)
    monkeypatch.setattr(generate, "MOST_TEXTS", max(1, passed // 2))
    monkeypatch.setattr(product, "CHUNK_BYTES", 4 * 64 * 7)
    assert together(checkpoint, PROMPTS, []) == expected


@settings(deadline=None, max_examples=15)
@given(
    lengths=st.lists(st.integers(1, 45), min_size=1, max_size=7),
    room=st.integers(0, 200),
    seed=st.integers(0, 99),
)
def test_who_else_is_there_does_not_matter(
    longrope: Path, lengths: list[int], room: int, seed: int
) -> None:
    some = prompts(lengths, most=6, seed=seed)
    bytes_each = token_bytes(Decoder(longrope, CheckpointReader(longrope)))
    few = together(longrope, some, [5], room * bytes_each)
    assert few == [together(longrope, [prompt], [5])[0] for prompt in some]


def test_keys_and_values_stay_within_their_room(longrope: Path) -> None:
    decoder = Decoder(longrope, CheckpointReader(longrope))
    some = prompts([30, 20, 20, 10, 10, 60, 5, 5], most=10)
    room = 65 * token_bytes(decoder)
    generation, most = Generation(decoder, some, [], room), 0
    while parts := generation.take_up():
        kept = sum(text._kept.nbytes for text in generation.running)
        assert kept <= room or len(generation.running) == 1
        most = max(most, len(generation.running))
        generation.run(parts, lambda share: None)
    assert most > 1
    assert not generation.waiting


def test_what_has_ended_makes_room_at_once(longrope: Path) -> None:
    decoder = Decoder(longrope, CheckpointReader(longrope))
    some = [Prompt([7], most) for most in (9, 1, 1, 1, 1, 1)]
    generation, passes = Generation(decoder, some, [], 12 * token_bytes(decoder)), 0
    while parts := generation.take_up():
        generation.run(parts, lambda share: None)
        passes += 1
    assert passes == 9, "the short ones went beside the long one"


def test_a_few_megabytes_of_the_weights_are_there_at_a_time(
    longrope: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there: dict[int, int] = {}
    most: list[int] = []
    read = CheckpointReader.read

    def counted(*given: Any) -> torch.Tensor:
        tensor = read(*given)
        key = id(tensor)
        there[key] = tensor.nbytes
        weakref.finalize(tensor, there.pop, key)
        most.append(sum(there.values()))
        return tensor

    layer = 4 * (64 * 4 * 64 + 3 * 64 * 96)
    monkeypatch.setattr(CheckpointReader, "read", counted)
    monkeypatch.setattr(product, "CHUNK_BYTES", 4096)
    found = together(longrope, PROMPTS, [])
    assert len(found) == len(PROMPTS)
    norms, rows = 3 * 4 * 64, 4 * 64 * len(set(PROMPTS[0].tokens)) * 400
    assert max(most) <= max(2 * 4096 + norms, rows)
    assert sum(most) > 12 * layer, "all of it, again and again"


def test_every_matrix_is_read_once_a_pass(longrope: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count: dict[str, int] = {}
    chunks = product.chunks

    def counted(reader: CheckpointReader, name: str) -> Any:
        count[name] = count.get(name, 0) + 1
        return chunks(reader, name)

    monkeypatch.setattr(product, "chunks", counted)
    together(longrope, prompts([9, 9, 9], most=5), [])
    assert len(count) == 2 * 4 + 1
    assert set(count.values()) == {5}


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_tiny(tmp_path)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = torch.nan
    save_file(tensors, file)
    with pytest.raises(CheckpointRefused, match="infinities or NaN"):
        together(folder, PROMPTS, [])


def test_a_pass_is_tried_with_a_layer(longrope: Path) -> None:
    assert generate.pass_seconds(Decoder(longrope, CheckpointReader(longrope)), 3) > 0
