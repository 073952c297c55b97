import hashlib
import json
import math
from dataclasses import dataclass
from importlib import import_module

import pytest

from phi3_mlflow.core.errors import UserError
from phi3_mlflow.core.progress import no_progress
from phi3_mlflow.training import resume
from phi3_mlflow.training.settings import TrainSettings
from tests.fixtures.tiny_phi3 import make_tiny


@dataclass(frozen=True)
class Tokens:
    input_ids: tuple[int, ...]
    loss_mask: tuple[int, ...]


def rows(count, start=0):
    """A prompt of letters, and an answer that says its first letter and stops."""
    made = []
    for i in range(start, start + count):
        prompt = [3, *(6 + (i * 7 + j * 13) % 200 for j in range(4 + i % 5)), 2, 4]
        answer = [prompt[1], prompt[2], 2]
        made.append(Tokens((*prompt, *answer), (*(0 for _ in prompt), 1, 1, 1)))
    return made


def settings(**more):
    return TrainSettings(
        **{
            "data": "rows.jsonl",
            "lora_r": 4,
            "lora_alpha": 8,
            "lora_dropout": 0.1,
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 4,
            "num_train_epochs": 2,
            "save_steps": 2,
            "threads": 1,
            **more,
        }
    )


class Heard:
    def __init__(self, stop_at=None):
        self.points, self.began, self.stop_at = [], [], stop_at

    def begins(self, step, steps):
        self.began.append((step, steps))

    def point(self, step, values):
        if step == self.stop_at and "loss" in values:
            raise KeyboardInterrupt
        self.points.append((step, dict(values)))

    def of(self, name):
        return [values[name] for _, values in self.points if name in values]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny") / "checkpoint")


def run(
    checkpoint,
    place,
    chosen,
    heard=None,
    train_rows=None,
    validation=None,
    rehearsal=(),
    engine="train",
):
    train = import_module(f"phi3_mlflow.training.{engine}").train
    place.mkdir(parents=True, exist_ok=True)
    return train(
        checkpoint,
        rows(20) if train_rows is None else train_rows,
        rows(4, 50) if validation is None else validation,
        chosen,
        folder=place / "work",
        out=place,
        base_model="microsoft/Phi-3-mini-4k-instruct",
        listener=heard or Heard(),
        rehearsal=rehearsal,
    )


@pytest.fixture(scope="module")
def undisturbed(checkpoint, tmp_path_factory):
    heard = Heard()
    place = tmp_path_factory.mktemp("undisturbed")
    return place, run(checkpoint, place, settings(), heard), heard


def test_the_loss_falls_and_the_curve_is_told(undisturbed):
    place, trained, heard = undisturbed
    assert heard.began == [(0, 10)]
    assert trained.steps == trained.chosen_step == 10
    losses = heard.of("loss")
    assert len(losses) == 10
    assert losses[-1] < losses[0]
    assert len(heard.of("validation_loss")) == 6  # before the first step, and every two
    assert all(math.isfinite(v) and v > 0 for v in heard.of("tokens_per_second"))
    told = [
        {k: v for k, v in values.items() if k != "tokens_per_second"} for _, values in heard.points
    ]
    assert [
        {k: v for k, v in p.items() if k not in ("step", "epoch")} for p in trained.curve
    ] == told
    assert trained.adapter_sha256 == sha256(place / "adapter_model.safetensors")


def test_the_adapter_is_in_pefts_format_and_names_no_path(checkpoint, undisturbed):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    place, _, _ = undisturbed
    text = (place / "adapter_config.json").read_text()
    config = json.loads(text)
    assert config["base_model_name_or_path"] == "microsoft/Phi-3-mini-4k-instruct"
    assert config["target_modules"] == ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]
    assert str(checkpoint) not in text
    assert str(place) not in text
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), place)
    adapted = {n for n, _ in model.named_parameters() if "lora_B" in n}
    assert len(adapted) == 8  # four projections of two layers


def test_the_same_again_gives_the_same_bytes(checkpoint, undisturbed, tmp_path):
    place, trained, _ = undisturbed
    again = run(checkpoint, tmp_path, settings())
    assert again == trained
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / name).read_bytes() == (place / name).read_bytes()


@pytest.mark.parametrize("step", [1, 3, 6, 9, 10])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(checkpoint, undisturbed, tmp_path, step):
    _, trained, _ = undisturbed
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, tmp_path, settings(), Heard(stop_at=step))
    heard = Heard()
    assert run(checkpoint, tmp_path, settings(), heard) == trained
    assert heard.began == [((step - 1) // 2 * 2, 10)]


def test_a_checkpoint_that_was_being_written_is_not_gone_on_from(checkpoint, undisturbed, tmp_path):
    _, trained, _ = undisturbed
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, tmp_path, settings(), Heard(stop_at=7))
    work = tmp_path / "work"
    assert sorted(p.name for p in work.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    (work / "checkpoint-6" / "manifest.json").unlink()
    assert resume.last_whole(work) == work / "checkpoint-4"
    assert not (work / "checkpoint-6").exists()
    assert run(checkpoint, tmp_path, settings()) == trained


def test_a_run_that_has_ended_trains_no_more(checkpoint, undisturbed):
    place, trained, _ = undisturbed
    heard = Heard()
    assert run(checkpoint, place, settings(), heard) == trained
    assert heard.began == []


def test_other_seeds_give_other_bytes(checkpoint, undisturbed, tmp_path):
    _, trained, _ = undisturbed
    assert run(checkpoint, tmp_path, settings(seed=1)).adapter_sha256 != trained.adapter_sha256


def test_gradients_add_up_over_batches(checkpoint, tmp_path):
    one = run(checkpoint, tmp_path / "1", settings(lora_dropout=0, lora_r=2))
    chosen = settings(
        lora_dropout=0,
        lora_r=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
    )
    two = run(checkpoint, tmp_path / "2", chosen)
    assert two.steps == one.steps
    assert two.last("loss") == pytest.approx(one.last("loss"), rel=1e-3)


def test_a_learning_rate_of_10_stops_with_the_step(checkpoint, tmp_path):
    from phi3_mlflow.training.merge import merge_adapter

    chosen = settings(
        learning_rate=0.02, num_train_epochs=16, lora_dropout=0, lora_r=8, save_steps=80
    )
    learnt = run(checkpoint, tmp_path / "learnt", chosen, validation=rows(20))
    assert learnt.last("validation_loss") < 2
    (tmp_path / "merged").mkdir()
    merge_adapter(checkpoint, tmp_path / "learnt", tmp_path / "merged", no_progress)
    chosen = settings(learning_rate=10, num_train_epochs=4, warmup_ratio=0)
    with pytest.raises(UserError, match=r"stopped at step \d+ of 20, .*went astray: ") as told:
        run(tmp_path / "merged", tmp_path / "astray", chosen, validation=rows(20))
    assert "lower train.learning_rate than 10" in str(told.value)
    assert not (tmp_path / "astray" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("values", "stops"),
    [
        ({"loss": math.nan}, "loss went astray"),
        ({"loss": 2.0, "grad_norm": math.inf}, "grad_norm went astray"),
        ({"loss": 11.6}, "loss went astray"),
        ({"loss": 11.5}, None),
        ({"validation_loss": 4.1}, "validation_loss went astray"),
        ({"validation_loss": 3.9}, None),
    ],
)
def test_what_leads_nowhere_is_stopped(tmp_path, values, stops):
    from types import SimpleNamespace

    from phi3_mlflow.training.watch import Watch

    watch = Watch(settings(), Heard(), tmp_path, vocabulary=320)
    history = [{"eval_loss": 2.0, "step": 0}, {"loss": 2.1, "step": 1}]
    state = SimpleNamespace(log_history=history, global_step=7, max_steps=10)
    if stops is None:
        watch._stop_if_lost(state, values)
        return
    (tmp_path / "checkpoint-4").mkdir()
    resume.mark_whole(tmp_path / "checkpoint-4")
    with pytest.raises(UserError, match=f"step 7 of 10, because the {stops}") as told:
        watch._stop_if_lost(state, values)
    assert f"its last checkpoint is {tmp_path / 'checkpoint-4'}" in str(told.value)


def test_it_stops_early_and_keeps_the_best(checkpoint, tmp_path):
    chosen = settings(
        early_stopping_patience=2, learning_rate=0.05, num_train_epochs=20, warmup_ratio=0
    )
    heard = Heard()
    trained = run(checkpoint, tmp_path, chosen, heard)
    losses = {p["step"]: p["validation_loss"] for p in trained.curve if "validation_loss" in p}
    assert trained.steps < 100
    losses.pop(0)
    assert trained.chosen_step == min(losses, key=losses.get)
    with pytest.raises(UserError, match="early_stopping_patience needs rows"):
        run(checkpoint, tmp_path / "none", chosen, validation=[])


def test_no_rows_are_refused(checkpoint, tmp_path):
    with pytest.raises(UserError, match="no row to train on"):
        run(checkpoint, tmp_path, settings(), train_rows=[])


def test_labels_that_are_not_those_of_the_mask_are_a_fault():
    import torch

    from phi3_mlflow.training.train import _CheckedOnce, labels_of

    row = rows(1)[0]
    example = {"input_ids": list(row.input_ids), "labels": labels_of(row)}
    right = {"labels": torch.tensor([labels_of(row)])}
    assert _CheckedOnce(lambda _: right, [row])([example]) is right
    wrong = {"labels": torch.tensor([list(row.input_ids)])}
    with pytest.raises(RuntimeError, match="not those of the loss mask"):
        _CheckedOnce(lambda _: wrong, [row])([example])


def test_threads_are_as_before(undisturbed):
    import torch

    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.get_num_threads() >= 1


def sha256(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()
