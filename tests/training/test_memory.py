"""How much memory training takes: what it depends on, and where there is too little."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import pytest
from pydantic import ValidationError

from benchmarks.random_checkpoint import MODELS, tensor_shapes
from phi3_mlflow.core.errors import EnvironmentProblem
from phi3_mlflow.layers.room import PASS_TOKENS
from phi3_mlflow.training.memory import (
    TrainingMemory,
    engine_for,
    require_memory,
    streamed_memory,
    training_memory,
)
from phi3_mlflow.training.settings import TrainSettings
from tests.fixtures.tiny_phi3 import make_tiny
from tests.training.test_train import settings


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny") / "checkpoint")


def test_it_counts_the_weights_and_the_adapter(checkpoint: Path) -> None:
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from phi3_mlflow.training.lora import lora_config

    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    found = training_memory(checkpoint, settings(), 10)
    assert found.weights == 4 * sum(tensor.numel() for tensor in model.parameters())
    adapted = get_peft_model(model, lora_config(settings()))
    trained = sum(t.numel() for t in adapted.parameters() if t.requires_grad)
    assert found.adapter == 4 * 4 * trained


def test_batches_and_rows_make_it_larger_and_checkpointing_smaller(checkpoint: Path) -> None:
    def activations(longest: int, **more: int) -> int:
        return training_memory(checkpoint, settings(**more), longest).activations

    assert activations(20) == 2 * activations(10)
    assert activations(10, per_device_train_batch_size=8) == activations(20)
    assert activations(10, gradient_checkpointing=True) < activations(10)
    twice = training_memory(checkpoint, settings(), 10, layers=4)
    once = training_memory(checkpoint, settings(), 10)
    assert twice.adapter == 2 * once.adapter
    assert once.weights < twice.weights < 2 * once.weights


def test_too_little_is_refused_with_numbers_and_what_helps(checkpoint: Path) -> None:
    with pytest.raises(EnvironmentProblem) as told:
        require_memory(checkpoint, settings(), 5000, available=900_000_000)
    text = str(told.value)
    assert text.startswith("training needs about ")
    assert "and 0.9 GB are available" in text
    assert "a batch of 4 x 5,000 tokens" in text
    assert "train.per_device_train_batch_size 1 with 4 accumulated takes " in text
    assert "and train.gradient_checkpointing takes " in text
    needed = training_memory(checkpoint, settings(), 10)
    assert require_memory(checkpoint, settings(), 10, available=needed.total) == needed


def test_processes_on_one_machine_share_its_memory(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = training_memory(checkpoint, settings(), 10).total
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(EnvironmentProblem, match="in each of 2 processes"):
        require_memory(checkpoint, settings(), 10, available=2 * needed - 1)
    require_memory(checkpoint, settings(), 10, available=2 * needed)


def test_streamed_it_takes_a_layer_and_no_more_for_more_layers_or_rows(checkpoint: Path) -> None:
    def needed(longest: int, layers: int = 2, **more: int) -> TrainingMemory:
        chosen = settings(lora_dropout=0, **more)
        return streamed_memory(checkpoint, chosen, longest, layers=layers)

    assert needed(64).weights < training_memory(checkpoint, settings(), 64).weights
    assert needed(64).weights == needed(64, layers=40).weights
    assert needed(64).adapter == training_memory(checkpoint, settings(), 64).adapter
    many = needed(64, per_device_train_batch_size=1024)
    assert many == needed(64, per_device_train_batch_size=1024, gradient_accumulation_steps=9)
    assert many == needed(PASS_TOKENS, per_device_train_batch_size=1)
    assert many.total > needed(64).total


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of many layers: headers, and no weights."""
    config = {"tie_word_embeddings": False, **MODELS["phi-3-mini-4k"]}
    shapes = tensor_shapes(config)
    folder, offset, header = tmp_path_factory.mktemp("large"), 0, {}
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        place = [offset, offset + size]
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": place}
        offset += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + offset)  # a hole in the file
    return folder


def unasked() -> int:
    raise AssertionError("the rows need not be read")


def on_cpu() -> bool:
    return False


def test_auto_takes_the_engine_that_fits_the_machine(large: Path) -> None:
    chosen = TrainSettings(
        data=Path("rows.jsonl"), per_device_train_batch_size=1, gradient_checkpointing=True
    )
    assert engine_for(large, chosen, unasked, 32 * 10**9, on_cpu) == "memory"
    assert engine_for(large, chosen, unasked, 8 * 10**9, on_cpu) == "streamed"
    assert engine_for(large, chosen, unasked, 8 * 10**9, lambda: True) == "memory"
    assert engine_for(large, chosen, unasked, None, on_cpu) == "memory"
    assert engine_for(large, chosen, unasked, 10**9, on_cpu) == "memory"  # and is refused
    # Between the shortest and the longest row that there may be, it depends on those there are.
    several = chosen.model_copy(update={"per_device_train_batch_size": 8})
    assert engine_for(large, several, lambda: 20, 24 * 10**9, on_cpu) == "memory"
    assert engine_for(large, several, lambda: 1024, 24 * 10**9, on_cpu) == "streamed"
    # What only one engine can do, and what is chosen.
    for more in ({"lora_dropout": 0.1}, {"num_processes": 2}, {"engine": "memory"}):
        only = chosen.model_copy(update=more)
        assert engine_for(large, only, unasked, 8 * 10**9, on_cpu) == "memory"
    told = chosen.model_copy(update={"engine": "streamed"})
    assert engine_for(large, told, unasked, 32 * 10**9, on_cpu) == "streamed"


def test_phi_3_mini_streamed_is_meant_to_fit_3_gb(large: Path) -> None:
    """The estimate; what is measured is in benchmarks/train_streamed.py."""
    chosen = TrainSettings(data=Path("rows.jsonl"), engine="streamed")
    assert 2 * 10**9 < streamed_memory(large, chosen, 4096).total < 3 * 10**9


def test_refusals_name_the_other_engine_or_what_is_left(large: Path) -> None:
    chosen = TrainSettings(data=Path("rows.jsonl"))
    with pytest.raises(EnvironmentProblem, match=r"train\.engine: streamed takes \d\.\d GB, and"):
        require_memory(large, chosen, 1024, available=4 * 10**9)
    with pytest.raises(EnvironmentProblem) as told:
        require_memory(
            large, chosen.model_copy(update={"engine": "streamed"}), 1024, available=10**9
        )
    text = str(told.value)
    assert "for one layer's weights in float32" in text
    assert "for what rows of up to 1,024 tokens leave" in text
    assert "a smaller train.max_length leaves out longer rows; or take" in text
    for useless in ("gradient_checkpointing", "per_device_train_batch_size", "GPU", "streamed"):
        assert useless not in text


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"lora_dropout": 0.05}, "has no dropout, and lora_dropout is 0.05"),
        ({"rehearsal": Path("t.jsonl")}, "has nothing to rehearse, and rehearsal is given"),
        ({"num_processes": 2}, "has one process alone, and num_processes is 2"),
    ],
)
def test_what_streamed_cannot_do_is_refused_with_the_profile(more: dict, told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        TrainSettings(data=Path("rows.jsonl"), engine="streamed", **more)
    assert TrainSettings(data=Path("rows.jsonl"), **more).engine == "auto"
