"""The engine with one layer in memory trains as the other does, and as well after a kill."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from phi3_mlflow.core.errors import UserError
from phi3_mlflow.training import resume
from phi3_mlflow.training.run import Trained
from phi3_mlflow.training.settings import TrainSettings
from tests.fixtures.tiny_phi3 import make_tiny
from tests.training.test_train import Heard
from tests.training.test_train import run as run_in_memory
from tests.training.test_train import settings as any_settings

FILES = ("adapter_model.safetensors", "adapter_config.json")
# What the two engines may differ by: float32 sums cut up differently, and AdamW, which makes much
# of a gradient that is next to nothing.
CURVE, ADAPTER = 1e-4, 1e-2


def settings(**more: Any) -> TrainSettings:
    return any_settings(**{"engine": "streamed", "lora_dropout": 0, **more})


run = partial(run_in_memory, engine="streamed")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="module")
def undisturbed(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Trained, Heard]:
    heard, place = Heard(), tmp_path_factory.mktemp("undisturbed")
    return place, run(checkpoint, place, settings(), heard), heard


def assert_alike(found: Trained, expected: Trained) -> None:
    assert found.steps == expected.steps
    assert found.chosen_step == expected.chosen_step
    assert len(found.curve) == len(expected.curve)
    for point, other in zip(found.curve, expected.curve, strict=True):
        assert point.keys() == other.keys()
        assert point == pytest.approx(other, rel=CURVE)


def assert_same_adapter(found: Path, expected: Path) -> None:
    from safetensors.torch import load_file

    assert (found / FILES[1]).read_bytes() == (expected / FILES[1]).read_bytes()
    ours, theirs = load_file(found / FILES[0]), load_file(expected / FILES[0])
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).norm() <= ADAPTER * tensor.norm(), name


def test_it_trains_as_the_other_engine(
    checkpoint: Path, undisturbed: tuple[Path, Trained, Heard], tmp_path: Path
) -> None:
    place, trained, heard = undisturbed
    other = Heard()
    in_memory = run_in_memory(checkpoint, tmp_path, settings(), other)
    assert_alike(trained, in_memory)
    assert_same_adapter(place, tmp_path)
    assert heard.began == other.began
    assert [step for step, _ in heard.points] == [step for step, _ in other.points]
    assert [values.keys() for _, values in heard.points] == [v.keys() for _, v in other.points]


@pytest.mark.parametrize(
    "more",
    [
        # Five batches of the epoch, in steps of two, two and one.
        {
            "gradient_accumulation_steps": 2,
            "weight_decay": 0.1,
            "max_grad_norm": 0.5,
            "lr_scheduler_type": "linear",
            "warmup_ratio": 0.4,
            "save_steps": 4,
        },
        {"packing": True, "max_length": 40, "per_device_train_batch_size": 2, "seed": 3},
        {"early_stopping_patience": 1, "learning_rate": 0.05, "warmup_ratio": 0, "save_steps": 1},
    ],
    ids=["accumulated", "packed", "patient"],
)
def test_settings_mean_what_they_mean_to_the_other(
    checkpoint: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    chosen = settings(**more)
    found = run(checkpoint, tmp_path / "streamed", chosen)
    assert_alike(found, run_in_memory(checkpoint, tmp_path / "memory", chosen))
    assert_same_adapter(tmp_path / "streamed", tmp_path / "memory")


def test_the_adapter_is_loaded_by_peft(
    checkpoint: Path, undisturbed: tuple[Path, Trained, Heard]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    place, _, _ = undisturbed
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), place)
    assert len([name for name, _ in model.named_parameters() if "lora_B" in name]) == 8
    config = json.loads((place / FILES[1]).read_text())
    assert config["base_model_name_or_path"] == "microsoft/Phi-3-mini-4k-instruct"


@pytest.mark.parametrize("step", [1, 6, 10])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    checkpoint: Path, undisturbed: tuple[Path, Trained, Heard], tmp_path: Path, step: int
) -> None:
    place, trained, _ = undisturbed
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, tmp_path, settings(), Heard(stop_at=step))
    kept = sorted(path.name for path in (tmp_path / "work").glob("checkpoint-*"))
    assert kept == {1: [], 6: ["checkpoint-2", "checkpoint-4"]}.get(
        step, ["checkpoint-6", "checkpoint-8"]
    )
    heard = Heard()
    assert run(checkpoint, tmp_path, settings(), heard) == trained
    assert heard.began == [((step - 1) // 2 * 2, 10)]
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (place / name).read_bytes()
    assert run(checkpoint, tmp_path, settings(), heard) == trained
    assert len(heard.began) == 1  # there was nothing left to train


def test_a_checkpoint_that_was_being_written_is_not_gone_on_from(
    checkpoint: Path, undisturbed: tuple[Path, Trained, Heard], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, tmp_path, settings(), Heard(stop_at=5))
    (tmp_path / "work" / "checkpoint-4" / "optimizer.pt").write_bytes(b"half of it")
    assert resume.last_whole(tmp_path / "work") == tmp_path / "work" / "checkpoint-2"
    assert run(checkpoint, tmp_path, settings()) == undisturbed[1]


def test_the_best_checkpoint_is_kept(checkpoint: Path, tmp_path: Path) -> None:
    chosen = settings(
        early_stopping_patience=2, learning_rate=0.05, num_train_epochs=20, warmup_ratio=0
    )
    trained = run(checkpoint, tmp_path, chosen)
    losses = {p["step"]: p["validation_loss"] for p in trained.curve if "validation_loss" in p}
    losses.pop(0)
    assert trained.steps < 100
    assert trained.chosen_step == min(losses, key=lambda step: losses[step])
    kept = {path.name for path in (tmp_path / "work").glob("checkpoint-*")}
    assert kept == {f"checkpoint-{trained.chosen_step}", f"checkpoint-{trained.steps}"}


def test_what_goes_astray_is_stopped(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from phi3_mlflow.training import streamed

    computed = streamed.add_gradients

    def astray(*given: Any, **named: Any) -> torch.Tensor:
        losses = computed(*given, **named)
        there = (tmp_path / "work" / "checkpoint-2" / "manifest.json").exists()
        return losses * torch.nan if there else losses

    monkeypatch.setattr(streamed, "add_gradients", astray)
    with pytest.raises(UserError, match="stopped at step 3 of 10, because the loss went astray"):
        run(checkpoint, tmp_path, settings())
    assert resume.last_whole(tmp_path / "work") == tmp_path / "work" / "checkpoint-2"
    assert not (tmp_path / FILES[0]).exists()


def test_a_checkpoint_with_dropout_is_refused(tmp_path: Path) -> None:
    checkpoint = make_tiny(tmp_path / "model", resid_pdrop=0.1)
    with pytest.raises(UserError, match=r"config\.json has resid_pdrop 0\.1, and train\.engine"):
        run(checkpoint, tmp_path, settings())
