import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from phi3_mlflow.checkpoints.reader import CheckpointReader
from phi3_mlflow.checkpoints.validate import validate_checkpoint
from phi3_mlflow.core.errors import UserError
from phi3_mlflow.core.progress import no_progress
from phi3_mlflow.training.lora import lora_config
from phi3_mlflow.training.merge import merge_adapter
from phi3_mlflow.training.settings import TrainSettings
from tests.fixtures.tiny_phi3 import make_tiny

IDS = torch.tensor([[1, 3, 70, 80, 90, 2, 4, 100, 33]])


def load(place):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()


def make_adapter(checkpoint, place, **chosen):
    """An adapter whose matrices are all random: B of a fresh one is zero."""
    from peft import get_peft_model

    settings = TrainSettings(data="rows.jsonl", lora_r=4, lora_alpha=12, **chosen)
    torch.manual_seed(1)
    model = get_peft_model(load(checkpoint), lora_config(settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(place)
    return place


@pytest.fixture(params=["phi-3-mini-4k", "phi-3.5-mini", "phi-3-medium-4k", "phi-4-mini"])
def made(request, tmp_path):
    checkpoint = make_tiny(tmp_path / "checkpoint", request.param)
    return checkpoint, make_adapter(checkpoint, tmp_path / "adapter"), tmp_path / "out"


def test_the_merged_checkpoint_is_pefts_own(made):
    from peft import PeftModel

    checkpoint, adapter, out = made
    out.mkdir()
    merged = merge_adapter(checkpoint, adapter, out, no_progress)
    assert merged.matrices == 8
    assert merged.largest_change > 0.01
    validate_checkpoint(out)
    ours, theirs = load(out), PeftModel.from_pretrained(load(checkpoint), adapter)
    theirs = theirs.merge_and_unload()
    dtype = CheckpointReader(checkpoint).read("model.layers.0.self_attn.qkv_proj.weight").dtype
    with torch.no_grad():
        for parameter in theirs.parameters():  # not the buffers
            parameter.copy_(parameter.to(dtype))
        found, expected = ours(IDS).logits, theirs(IDS).logits
        before = load(checkpoint)(IDS).logits
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)
    assert (found - before).abs().max() > 0.1


def test_dtypes_order_and_companions_stay(made):
    checkpoint, adapter, out = made
    out.mkdir()
    merge_adapter(checkpoint, adapter, out, no_progress)
    before, after = CheckpointReader(checkpoint), CheckpointReader(out)
    assert list(after) == list(before)
    assert all(after.entry(n).dtype == before.entry(n).dtype for n in before)
    same = [n for n in before if torch.equal(before.read(n), after.read(n))]
    assert len(list(before)) - len(same) == 8
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (checkpoint / name).read_bytes()


def test_a_large_checkpoint_is_written_in_parts(tmp_path):
    checkpoint = make_tiny(tmp_path / "checkpoint")
    adapter = make_adapter(checkpoint, tmp_path / "adapter", target_modules=("o_proj",))
    for name, size in (("whole", 10**9), ("parts", 60_000)):
        (tmp_path / name).mkdir()
        merge_adapter(checkpoint, adapter, tmp_path / name, no_progress, shard_bytes=size)
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 2
    validate_checkpoint(tmp_path / "parts")
    whole, parts = CheckpointReader(tmp_path / "whole"), CheckpointReader(tmp_path / "parts")
    assert all(torch.equal(whole.read(n), parts.read(n)) for n in whole)


def test_an_adapter_of_another_model_or_kind_is_refused(tmp_path):
    checkpoint = make_tiny(tmp_path / "checkpoint")
    wide = make_tiny(tmp_path / "wide", intermediate_size=128)
    deep = make_tiny(tmp_path / "deep", num_hidden_layers=3)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"does not fit model\.layers\.0\.mlp"):
        merge_adapter(checkpoint, make_adapter(wide, tmp_path / "1"), tmp_path / "out", no_progress)
    with pytest.raises(UserError, match=r"does not have: .*layers\.2\."):
        merge_adapter(checkpoint, make_adapter(deep, tmp_path / "2"), tmp_path / "out", no_progress)
    adapter = make_adapter(checkpoint, tmp_path / "3")
    config = json.loads((adapter / "adapter_config.json").read_text())
    shutil.copytree(adapter, tmp_path / "dora")
    (tmp_path / "dora" / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(UserError, match="not plain LoRA: use_dora cannot be merged"):
        merge_adapter(checkpoint, tmp_path / "dora", tmp_path / "out", no_progress)
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors.pop(next(name for name in tensors if "lora_B" in name))
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"does not fit .* B is \[\]"):
        merge_adapter(checkpoint, adapter, tmp_path / "out", no_progress)
