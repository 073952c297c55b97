import pytest

from phi3_mlflow.checkpoints.reader import CheckpointReader
from phi3_mlflow.core.errors import UserError
from phi3_mlflow.training.lora import adapted_tensors, lora_config
from phi3_mlflow.training.settings import PROJECTIONS, TrainSettings
from tests.fixtures.tiny_phi3 import ARCHITECTURES, make_tiny


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    return CheckpointReader(make_tiny(tmp_path_factory.mktemp("tiny") / "checkpoint"))


def test_the_named_projections_of_every_layer(reader):
    assert len(adapted_tensors(reader, PROJECTIONS)) == 8
    assert set(adapted_tensors(reader, ("self_attn.o_proj",))) == {
        f"model.layers.{layer}.self_attn.o_proj.weight" for layer in (0, 1)
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_peft_adapts_what_was_said(architecture, tmp_path):
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    place = make_tiny(tmp_path / "checkpoint", architecture)
    said = adapted_tensors(CheckpointReader(place), ("qkv_proj", "down_proj"))
    settings = TrainSettings(data="rows.jsonl", target_modules=("qkv_proj", "down_proj"))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(place), lora_config(settings))
    adapted = {n for n, _ in model.named_parameters() if "lora_A" in n}
    assert adapted == {
        f"base_model.model.{name.removesuffix('.weight')}.lora_A.default.weight" for name in said
    }


def test_every_name_that_matches_nothing_is_refused(reader):
    with pytest.raises(UserError) as told:
        adapted_tensors(reader, ("qkv_proj", "q_proj", "v_proj", "lm_head", "proj", "norm"))
    assert str(told.value) == (
        "train.target_modules names what no layer of the model has:\n"
        "  - q_proj\n  - v_proj\n  - lm_head\n  - proj\n  - norm\n"
        "The model has down_proj, gate_up_proj, o_proj, qkv_proj."
    )


def test_a_name_twice_is_refused():
    with pytest.raises(ValueError, match="qkv_proj is listed more than once"):
        TrainSettings(data="rows.jsonl", target_modules=("qkv_proj", "qkv_proj"))
