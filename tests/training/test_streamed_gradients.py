"""Layer by layer gives the losses and the gradients that peft gives for the model as a whole."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from phi3_mlflow.checkpoints.reader import CheckpointReader
from phi3_mlflow.layers import backward, head, layer, states
from phi3_mlflow.layers.backward import add_gradients
from phi3_mlflow.layers.decoder import Decoder
from phi3_mlflow.runtime.adapter import key_of
from phi3_mlflow.training.adapter import Adapter
from phi3_mlflow.training.lora import lora_config
from phi3_mlflow.training.settings import TrainSettings
from tests.fixtures.tiny_phi3 import make_tiny
from tests.layers.test_forward import MODELS

IGNORED = -100
# On one side of LongRoPE's 32 tokens each: transformers takes a batch's factors by its longest row.
SHORT, LONG = [9, 31, 2, 17], [40, 64, 33]


def settings(**more: Any) -> TrainSettings:
    return TrainSettings(data=Path("rows.jsonl"), **{"lora_r": 4, "lora_alpha": 8, **more})


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture, more = MODELS[request.param]
    return make_tiny(tmp_path_factory.mktemp("model"), architecture, **more)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("plain"), "phi-3-mini-128k", window=20)


def random_rows(lengths: list[int], seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids, and labels of which the first third and some others carry no loss."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        tokens = torch.randint(6, 320, (length,), generator=generator)
        labels = torch.where(torch.rand(length, generator=generator) < 0.8, tokens, IGNORED)
        labels[: max(1, length // 3)] = IGNORED
        rows.append((tokens, labels))
    return rows


def in_memory(checkpoint: Path, adapter: Adapter, chosen: TrainSettings) -> Any:
    """The model in peft's hands, with the same adapter."""
    from peft import get_peft_model
    from transformers import Phi3ForCausalLM

    model = Phi3ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model = get_peft_model(model, lora_config(chosen))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                weight, _, matrix = name.partition(".lora_")
                pair = adapter.pairs[weight.removeprefix("base_model.model.") + ".weight"]
                parameter.copy_(pair["AB".index(matrix[0])])
    return model


def pefts(model: Any, rows: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[float, dict]:
    """Sum of the losses of a padded batch, and the gradients of their mean, by file names."""
    width = max(len(tokens) for tokens, _ in rows)
    ids = torch.full((len(rows), width), 2)
    labels = torch.full((len(rows), width), IGNORED)
    attended = torch.zeros((len(rows), width), dtype=torch.int64)
    for number, (tokens, wanted) in enumerate(rows):
        ids[number, : len(tokens)] = tokens
        labels[number, : len(tokens)] = wanted
        attended[number, : len(tokens)] = 1
    loss = model(input_ids=ids, labels=labels, attention_mask=attended, use_cache=False).loss
    model.zero_grad()
    loss.backward()
    gradients = {
        name.replace(".default", ""): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return loss.item() * int((labels[:, 1:] != IGNORED).sum()), gradients


def ours(
    checkpoint: Path, adapter: Adapter, rows: list[tuple[torch.Tensor, torch.Tensor]]
) -> tuple[float, dict]:
    decoder = Decoder(checkpoint, CheckpointReader(checkpoint))
    targets = [torch.cat([labels[1:], torch.tensor([IGNORED])]) for _, labels in rows]
    count = sum(int((some != IGNORED).sum()) for some in targets)
    for matrix in adapter.parameters:
        matrix.grad = None
    tokens = [tokens for tokens, _ in rows]
    losses = add_gradients(decoder, adapter, tokens, targets, scale=1 / count)
    assert len(losses) == count
    gradients = {
        key_of(name, which): matrix.grad
        for name, pair in adapter.pairs.items()
        for which, matrix in zip("AB", pair, strict=True)
    }
    return float(losses.sum()), gradients


def adapter_of(checkpoint: Path, chosen: TrainSettings) -> Adapter:
    """One whose B is not zero either, so that A has gradients."""
    adapter = Adapter(CheckpointReader(checkpoint), chosen)
    torch.manual_seed(1)
    with torch.no_grad():
        for _, b in adapter.pairs.values():
            b.normal_(0, 0.05)
    return adapter


def assert_same(found: dict, expected: dict, tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 0
        off = (found[name] - gradient).norm() / gradient.norm()
        assert off < tolerance, f"{name}: {off:.2e}"


@pytest.mark.parametrize("lengths", [SHORT, LONG])
def test_gradients_are_those_of_peft(checkpoint: Path, lengths: list[int]) -> None:
    chosen = settings()
    adapter, rows = adapter_of(checkpoint, chosen), random_rows(lengths)
    loss, gradients = ours(checkpoint, adapter, rows)
    expected_loss, expected = pefts(in_memory(checkpoint, adapter, chosen), rows)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_same(gradients, expected)


def test_of_some_projections_only(plain: Path) -> None:
    chosen = settings(target_modules=("mlp.down_proj", "qkv_proj"))
    adapter, rows = adapter_of(plain, chosen), random_rows(SHORT)
    model = in_memory(plain, adapter, chosen)
    assert_same(ours(plain, adapter, rows)[1], pefts(model, rows)[1])


def test_a_row_is_computed_as_by_itself(plain: Path) -> None:
    """Where rows lie on both sides of LongRoPE's border, each has the factors of its own length."""
    chosen = settings()
    adapter, rows = adapter_of(plain, chosen), random_rows([20, 50])
    model, expected = in_memory(plain, adapter, chosen), {}
    counts = [int((labels[1:] != IGNORED).sum()) for _, labels in rows]
    for row, count in zip(rows, counts, strict=True):
        for name, gradient in pefts(model, [row])[1].items():
            share = gradient.clone() * count / sum(counts)
            expected[name] = expected.get(name, 0) + share
    assert_same(ours(plain, adapter, rows)[1], expected)


def test_a_part_at_a_time_and_in_a_file_gives_the_same(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, rows = adapter_of(plain, settings()), random_rows([*SHORT, *LONG])
    loss, expected = ours(plain, adapter, rows)
    expected = {name: gradient.clone() for name, gradient in expected.items()}
    monkeypatch.setattr(layer, "places_together", lambda width: 7)
    monkeypatch.setattr(backward, "places_together", lambda width: 7)
    monkeypatch.setattr(backward, "_KEPT_BYTES", 1)
    monkeypatch.setattr(head, "_CHUNK_BYTES", 4 * 64 * 50)
    monkeypatch.setattr(head, "_LOGIT_BYTES", 4 * 50 * 11)
    monkeypatch.setattr(states.States.__init__, "__kwdefaults__", {"folder": None, "most": 100})
    found_loss, found = ours(plain, adapter, rows)
    assert found_loss == pytest.approx(loss, rel=1e-5)
    assert_same(found, expected)


def test_the_same_again_gives_the_same_bits(plain: Path) -> None:
    adapter, rows = adapter_of(plain, settings()), random_rows(SHORT)
    _, first = ours(plain, adapter, rows)
    first = {name: gradient.clone() for name, gradient in first.items()}
    _, second = ours(plain, adapter, rows)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_rows_without_loss_have_no_gradient(plain: Path) -> None:
    adapter, rows = adapter_of(plain, settings()), random_rows(SHORT)
    decoder = Decoder(plain, CheckpointReader(plain))
    targets = [torch.full_like(tokens, IGNORED) for tokens, _ in rows]
    losses = add_gradients(decoder, adapter, [tokens for tokens, _ in rows], targets, scale=1.0)
    assert len(losses) == 0
    assert all(not matrix.grad.any() for matrix in adapter.parameters)


def test_first_values_are_those_of_peft(checkpoint: Path) -> None:
    from peft import get_peft_model
    from transformers import Phi3ForCausalLM, set_seed

    chosen = settings(seed=5)
    adapter = Adapter(CheckpointReader(checkpoint), chosen)
    model = Phi3ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    set_seed(chosen.seed)
    model = get_peft_model(model, lora_config(chosen))
    theirs = {n: p for n, p in model.named_parameters() if "lora_" in n}
    names = [
        key_of(name, which).replace(".weight", ".default.weight")
        for name in adapter.pairs
        for which in "AB"
    ]
    assert list(theirs) == names
    for name, matrix in zip(names, adapter.parameters, strict=True):
        assert torch.equal(matrix, theirs[name])


def test_one_layer_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And never the whole head: what is read is counted until it is given back."""
    checkpoint = make_tiny(tmp_path, num_hidden_layers=5, vocab_size=320)
    monkeypatch.setattr(head, "_CHUNK_BYTES", 4 * 64 * 50)
    alive: dict[int, str] = {}
    layers_alive, head_alive, read = [], [], CheckpointReader.read_float

    def counted(self: CheckpointReader, name: str, rows: slice | None = None) -> torch.Tensor:
        tensor = read(self, name, rows)
        alive[id(tensor)] = name
        weakref.finalize(tensor, alive.pop, id(tensor))
        numbers = {one.split(".")[2] for one in alive.values() if ".layers." in one}
        layers_alive.append(len(numbers))
        head_alive.append(sum(one == "lm_head.weight" for one in alive.values()))
        return tensor

    monkeypatch.setattr(CheckpointReader, "read_float", counted)
    adapter = adapter_of(checkpoint, settings())
    ours(checkpoint, adapter, random_rows(SHORT))
    assert max(layers_alive) == 1
    assert max(head_alive) <= 2  # the chunk before goes when the next is there
    assert not [name for name in alive.values() if ".layers." in name]
