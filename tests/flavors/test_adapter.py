"""A fine-tuned model as its merged checkpoint, and as the one before training with an adapter."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from safetensors.torch import save_file

from phi3_mlflow.core.progress import no_progress
from phi3_mlflow.flavors.transformers import log_transformers
from phi3_mlflow.runtime.adapter import add_adapter
from phi3_mlflow.training.lora import adapted_tensors
from phi3_mlflow.training.merge import merge_adapter
from phi3_mlflow.training.settings import PROJECTIONS
from tests.flavors.conftest import tracking

RANK = 4
QUESTION = {"messages": [{"role": "user", "content": "What is new?"}], "max_tokens": 12}
# Answers from a folder, through both of MLflow's ways in, and says what else it has read.
SCRIPT = """
import json, sys
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
import mlflow
folder, question = sys.argv[1], json.loads(sys.argv[2])
answer = mlflow.pyfunc.load_model(folder).predict(question)["choices"]
pipeline = mlflow.transformers.load_model(folder)
text = pipeline(question["messages"], max_new_tokens=12, do_sample=False)
print(json.dumps([answer, text[0]["generated_text"][-1]["content"], sorted(set(opened))]))
"""


@pytest.fixture(scope="module")
def trained(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `train` leaves: a merged checkpoint, and beside it what is no part of it."""
    from phi3_mlflow.checkpoints.reader import CheckpointReader

    out = tmp_path_factory.mktemp("trained") / "out"
    adapter = tmp_path_factory.mktemp("adapter") / "adapter"
    out.mkdir()
    adapter.mkdir()
    reader = CheckpointReader(checkpoint)
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name in adapted_tensors(reader, PROJECTIONS):
        rows, columns = reader.shape(name)
        plain = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{plain}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator)
        tensors[f"{plain}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) / 8
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "a name",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": list(PROJECTIONS),
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    merge_adapter(checkpoint, adapter, out, no_progress)
    shutil.copytree(adapter, out / "adapter")
    for name in ("training.json", "validation.jsonl", "manifest.json"):
        (out / name).write_text("{}\n")
    return out


@pytest.fixture(scope="module")
def logged(store: str, checkpoint: Path, trained: Path) -> dict[str, Any]:
    with tracking(store):
        return {
            "merged": log_transformers(trained, name="tuned", dtype="float32"),
            "adapter": log_transformers(
                checkpoint, name="tuned", dtype="float32", adapter=trained / "adapter"
            ),
            "base": log_transformers(checkpoint, name="tuned", dtype="float32"),
        }


def files_of(info: Any) -> set[str]:
    folder = Path(mlflow.artifacts.download_artifacts(info.model_uri))
    return {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()}


def test_nothing_of_the_training_goes_into_what_is_logged(logged: dict[str, Any]) -> None:
    merged, adapter, base = (files_of(logged[name]) for name in ("merged", "adapter", "base"))
    assert merged == base
    assert adapter - base == {"peft/adapter_model.safetensors", "peft/adapter_config.json"}
    assert not base - adapter
    assert not [name for name in merged if "training" in name or "validation" in name]


def test_adapters_are_named_relative_to_the_folder(logged: dict[str, Any]) -> None:
    folder = Path(mlflow.artifacts.download_artifacts(logged["adapter"].model_uri))
    text = (folder / "MLmodel").read_text()
    assert "peft_adaptor: peft\n" in text
    assert "model_binary: model\n" in text
    assert "base_model_path" not in text
    assert "peft==" in (folder / "requirements.txt").read_text()
    merged = Path(mlflow.artifacts.download_artifacts(logged["merged"].model_uri))
    assert "peft" not in (merged / "requirements.txt").read_text()


def test_the_weights_in_memory_are_those_of_the_merged_checkpoint(
    checkpoint: Path, trained: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    add_adapter(model, trained / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32).state_dict()
    found = model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in merged.items())


def test_an_adapter_of_another_model_is_refused(
    checkpoint: Path, trained: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    shutil.copytree(trained / "adapter", tmp_path / "adapter")
    pair = {"base_model.model.lm_tail.lora_A.weight": torch.ones(2, 2)}
    save_file(pair, tmp_path / "adapter" / "adapter_model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match="is not one of this model"):
        add_adapter(model, tmp_path / "adapter")


def elsewhere(info: Any, place: Path) -> tuple[Any, str, list[str]]:
    """What a copy of a logged model answers in a process that has nothing else."""
    folder = place / "moved"
    shutil.copytree(Path(mlflow.artifacts.download_artifacts(info.model_uri)), folder)
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW", "PYTHON", "PHI3"))}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), json.dumps(QUESTION)],
        cwd=place,
        env={**keep, "HOME": str(place), "HF_HOME": str(place / "hf"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    answer, text, opened = json.loads(done.stdout.splitlines()[-1])
    return answer, text, opened


@pytest.mark.slow
def test_both_forms_answer_the_same_anywhere(
    logged: dict[str, Any], checkpoint: Path, trained: Path, tmp_path: Path
) -> None:
    answers = {}
    for name, info in logged.items():
        (tmp_path / name).mkdir()
        answer, text, opened = elsewhere(info, tmp_path / name)
        answers[name] = answer, text
        for source in (checkpoint, trained, Path(__file__).parents[2] / "phi3_mlflow"):
            assert not [path for path in opened if path.startswith(str(source))]
    assert answers["merged"] == answers["adapter"]
    assert answers["merged"] != answers["base"]
