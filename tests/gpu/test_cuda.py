"""What takes a GPU; skipped where there is none."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from phi3_mlflow.core.errors import EnvironmentProblem
from phi3_mlflow.core.progress import no_progress
from phi3_mlflow.evaluation.logits import OnnxLogits
from phi3_mlflow.flavors.onnx import rope_switch
from phi3_mlflow.genai.check import check_export
from phi3_mlflow.genai.export import export_onnx
from phi3_mlflow.genai.kept import kv_cache
from phi3_mlflow.quantization.quantize import quantize_checkpoint
from phi3_mlflow.quantization.settings import KQuantMixedSettings, RtnSettings
from phi3_mlflow.runtime.engine import Engine, EngineSettings
from phi3_mlflow.runtime.engine_genai import GenaiEngine
from phi3_mlflow.runtime.engine_torch import TorchEngine
from phi3_mlflow.training.masking import TokenizedRow
from phi3_mlflow.training.rehearsal import PIECE
from phi3_mlflow.training.settings import TrainSettings
from tests.fixtures.tiny_phi3 import ARCHITECTURES, make_tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

PROMPT = [5, 17, 200, 33, 80, 9, 61, 150]


@pytest.fixture(scope="module")
def genai() -> Any:
    og = import_module("onnxruntime_genai")
    if not og.is_cuda_available():
        pytest.skip("this onnxruntime-genai has no CUDA")
    return og


def answer(engine: Engine, count: int = 24) -> list[int]:
    """Greedy, and the same once more on a session that was rewound."""
    session = engine.open(len(PROMPT) + count + 2)
    session.extend(PROMPT)
    tokens = [session.follow(None)]
    while len(tokens) < count:
        tokens.append(session.follow(tokens[-1]))
    again = engine.open(len(PROMPT) + count + 2)
    again.extend([*PROMPT[:4], 7, 7])
    again.rewind(4)
    again.extend(PROMPT[4:])
    assert again.follow(None) == tokens[0]
    return tokens


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_transformers_on_cuda_answers_as_on_the_cpu(architecture: str, tmp_path: Path) -> None:
    checkpoint = make_tiny(tmp_path, architecture)
    found = [
        answer(TorchEngine(checkpoint, checkpoint, EngineSettings(provider=where, dtype="float32")))
        for where in ("cpu", "cuda")
    ]
    assert found[0] == found[1]


def test_transformers_on_cuda_in_bfloat16(tmp_path: Path) -> None:
    checkpoint = make_tiny(tmp_path)
    said = []
    for settings in (
        EngineSettings(dtype="float32"),
        EngineSettings(provider="cuda", dtype="bfloat16"),
    ):
        session = TorchEngine(checkpoint, checkpoint, settings).open(64)
        session.extend(PROMPT)
        said.append(session.logits())
    apart = np.linalg.norm(said[0] - said[1]) / np.linalg.norm(said[0])
    assert 0 < apart < 0.03


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_int4_on_cuda_says_what_it_says_on_the_cpu(
    architecture: str, tmp_path: Path, genai: Any
) -> None:
    checkpoint, settings = make_tiny(tmp_path / "float", architecture), RtnSettings()
    quantize_checkpoint(checkpoint, tmp_path / "int4", settings)
    said = []
    for provider, level in (("cpu", 1), ("cuda", 4)):  # level 1 computes in float32
        out = tmp_path / provider
        export_onnx(
            tmp_path / "int4", out, precision="int4", provider=provider, accuracy_level=level
        )
        if provider == "cuda":
            assert check_export(out, settings).logits == 320
        said.append(OnnxLogits(out).logits([np.arange(5, 29, dtype=np.int32)])[0])
    apart = np.linalg.norm(said[0] - said[1]) / np.linalg.norm(said[0])
    assert apart < 0.01
    settled = EngineSettings(
        provider="cuda",
        rope_switch=rope_switch(tmp_path / "cuda"),
        kv_cache=kv_cache(tmp_path / "cuda"),
    )
    engine = GenaiEngine(tmp_path / "cuda", settled)
    session = engine.open(64)
    session.extend(list(range(5, 29)))
    assert np.abs(session.logits() - said[1][-1]).max() < 0.05
    answer(engine)


def test_int8_weights_and_embedding_on_cuda(tmp_path: Path, genai: Any) -> None:
    checkpoint = make_tiny(tmp_path / "float", "phi-4-mini")
    settings = KQuantMixedSettings()
    quantize_checkpoint(checkpoint, tmp_path / "int4", settings)
    said = []
    for provider, level in (("cpu", 1), ("cuda", 4)):
        out = tmp_path / provider
        export_onnx(
            tmp_path / "int4", out, precision="int4", provider=provider, accuracy_level=level
        )
        said.append(OnnxLogits(out).logits([np.arange(5, 29, dtype=np.int32)])[0])
    apart = np.linalg.norm(said[0] - said[1]) / np.linalg.norm(said[0])
    assert apart < 0.01


def test_an_answer_by_a_schema_on_cuda(tmp_path: Path, genai: Any) -> None:
    checkpoint = make_tiny(tmp_path / "float")
    quantize_checkpoint(checkpoint, tmp_path / "int4", RtnSettings())
    export_onnx(tmp_path / "int4", tmp_path / "onnx", precision="int4", provider="cuda")
    engine = GenaiEngine(tmp_path / "onnx", EngineSettings(provider="cuda", kv_cache="float16"))
    session = engine.open_guided(80, json.dumps({"enum": [True, False]}))
    session.extend(PROMPT)
    decode, text = engine.decoder(), ""
    for _ in range(8):
        token = session.follow(None)
        if token in engine.ends:
            break
        text += decode(token)
    assert text.strip() in ("true", "false")


ROWS = tuple(
    TokenizedRow(
        (*(5 + (number + i) % 90 for i in range(25 + number % 7)), 2),
        (0,) * 8 + (1,) * (18 + number % 7),
        str(number),
    )
    for number in range(24)
)


TEXTS = [[5 + (3 * number + i) % 150 for i in range(PIECE)] for number in range(6)]


class Deaf:
    def begins(self, step: int, steps: int) -> None:
        pass

    def point(self, step: int, values: Any) -> None:
        pass


def trained(checkpoint: Path, place: Path, **more: Any) -> Any:
    train = import_module("phi3_mlflow.training.train")
    settings = TrainSettings(
        data=Path("rows.jsonl"), per_device_train_batch_size=4, learning_rate=5e-3, **more
    )
    out = place / "adapter"
    out.mkdir(parents=True)
    return train.train(
        checkpoint, ROWS, ROWS[:4], settings,
        folder=place / "run", out=out, base_model="none", listener=Deaf(),
        rehearsal=TEXTS if settings.rehearsal else (),
    )  # fmt: skip


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"packing": True},
        {"gradient_checkpointing": True},
        {"lora_dropout": 0.1},
        {"rehearsal": Path("texts.jsonl"), "rehearsal_tokens": 2 * PIECE},
    ],
)
def test_training_on_cuda_learns_and_repeats_itself(more: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = make_tiny(tmp_path / "base")
    first = trained(checkpoint, tmp_path / "1", num_train_epochs=3, **more)
    second = trained(checkpoint, tmp_path / "2", num_train_epochs=3, **more)
    losses = [point["loss"] for point in first.curve if "loss" in point]
    assert losses[-1] < losses[0] - 0.1
    assert first.adapter_sha256 == second.adapter_sha256


def test_training_on_cuda_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    checkpoint = make_tiny(tmp_path / "base")
    whole = trained(checkpoint, tmp_path / "whole", save_steps=2)
    train = import_module("phi3_mlflow.training.train")

    class Dies(Deaf):
        def point(self, step: int, values: Any) -> None:
            if step == 4:
                raise KeyboardInterrupt

    settings = TrainSettings(
        data=Path("rows.jsonl"), per_device_train_batch_size=4, learning_rate=5e-3, save_steps=2
    )
    out = tmp_path / "adapter"
    out.mkdir()
    given: Any = {"folder": tmp_path / "run", "out": out, "base_model": "none"}
    with pytest.raises(KeyboardInterrupt):
        train.train(checkpoint, ROWS, ROWS[:4], settings, listener=Dies(), **given)
    ended = train.train(checkpoint, ROWS, ROWS[:4], settings, listener=Deaf(), **given)
    assert ended.adapter_sha256 == whole.adapter_sha256


def test_a_gpu_that_is_too_small_is_said_so(tmp_path: Path) -> None:
    checkpoint = make_tiny(tmp_path / "base")
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-6)
    try:
        with pytest.raises(EnvironmentProblem, match=r"(?s)GPU.*streamed"):
            trained(checkpoint, tmp_path / "1")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_merging_what_was_trained_on_cuda(tmp_path: Path) -> None:
    merge = import_module("phi3_mlflow.training.merge")
    checkpoint = make_tiny(tmp_path / "base")
    trained(checkpoint, tmp_path / "1")
    (tmp_path / "merged").mkdir()
    merged = merge.merge_adapter(
        checkpoint, tmp_path / "1" / "adapter", tmp_path / "merged", no_progress
    )
    assert merged.matrices == 8
    assert merged.largest_change > 0
