"""How much memory training takes: what it depends on, and where there is too little."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from phi3_mlflow.core.errors import EnvironmentProblem
from phi3_mlflow.training.memory import require_memory, training_memory
from tests.fixtures.tiny_phi3 import make_tiny
from tests.training.test_train import settings

if TYPE_CHECKING:
    from pathlib import Path


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
