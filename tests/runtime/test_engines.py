"""The engines against the library that defines the model: the same tokens, at every length."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phi3_mlflow.flavors.onnx import rope_switch
from phi3_mlflow.runtime.engine import Engine, EngineSettings, cuts
from phi3_mlflow.runtime.engine_genai import GenaiEngine
from phi3_mlflow.runtime.engine_torch import TorchEngine
from tests.fixtures.tiny_checkpoints import CONTEXT, exported

CLOSE = 2e-3  # float32 sums in another order, over thousands of positions


def _engines(checkpoint: Path) -> tuple[GenaiEngine, TorchEngine]:
    onnx_dir = exported(checkpoint)
    settings = EngineSettings(threads=1, rope_switch=rope_switch(onnx_dir))
    return GenaiEngine(onnx_dir, settings), TorchEngine(checkpoint, checkpoint, settings)


def _tokens(count: int, seed: int = 0) -> list[int]:
    return [1, *(int(t) for t in np.random.default_rng(seed).integers(6, 260, count - 1))]


def _run(engine: Engine, tokens: list[int], pieces: list[int]) -> np.ndarray:
    session = engine.open(len(tokens) + 8)
    done = 0
    for end in pieces:
        session.extend(tokens[done:end])
        done = end
    return session.logits().copy()


def _reference(checkpoint: Path, tokens: list[int]) -> np.ndarray:
    """Logits of transformers' own forward pass over everything at once."""
    import torch
    from transformers import Phi3ForCausalLM

    model = Phi3ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.inference_mode():
        output = model(torch.tensor([tokens]), use_cache=False, logits_to_keep=1)
    return output.logits[0, -1].numpy()


@pytest.mark.parametrize("model", ["checkpoint", "windowed"])
@pytest.mark.parametrize("length", [2040, 2047, 2048, 2050, 4096, 4097, 5000])
def test_long_prompts_give_the_logits_of_transformers(
    request: pytest.FixtureRequest, model: str, length: int
) -> None:
    checkpoint = request.getfixturevalue(model)
    tokens = _tokens(length)
    expected = _reference(checkpoint, tokens)
    for engine in _engines(checkpoint):
        pieces = cuts(tokens, engine.ends, 64, engine.rope_switch)
        found = _run(engine, tokens, pieces)
        assert np.abs(found - expected).max() < CLOSE, type(engine).__name__


@pytest.mark.parametrize("boundary", [2047, 2048, 4096])
def test_decoding_across_a_boundary_gives_the_logits_of_transformers(
    windowed: Path, boundary: int
) -> None:
    tokens = _tokens(boundary + 6)
    start = boundary - 6
    expected = _reference(windowed, tokens)
    for engine in _engines(windowed):
        pieces = [*cuts(tokens[:start], engine.ends, 64, 0), *range(start + 1, len(tokens) + 1)]
        found = _run(engine, tokens, pieces)
        assert np.abs(found - expected).max() < CLOSE, type(engine).__name__


@pytest.mark.parametrize("start", [20, 31, 32, 33, 50])
def test_longrope_changes_its_factors_for_every_position(longrope: Path, start: int) -> None:
    tokens = _tokens(60)
    expected = _reference(longrope, tokens)
    for engine in _engines(longrope):
        assert engine.rope_switch == 32
        pieces = [*cuts(tokens[:start], engine.ends, 16, 32), *range(start + 1, len(tokens) + 1)]
        found = _run(engine, tokens, pieces)
        assert np.abs(found - expected).max() < CLOSE, type(engine).__name__


def _greedy(engine: Any, prompt: list[int], count: int) -> tuple[list[int], list[int]]:
    """The answer by single steps of the engine, and by the largest of the logits."""
    answers = []
    for by_steps in (True, False):
        session = engine.open(len(prompt) + count)
        session.extend(prompt)
        token, answer = None, []
        for _ in range(count):
            if by_steps:
                token = session.follow(token)
            else:
                if token is not None:
                    session.extend([token])
                token = int(session.logits().argmax())
            answer.append(token)
        answers.append(answer)
    return answers[0], answers[1]


def test_a_greedy_step_takes_the_largest_of_the_logits(
    checkpoint: Path, windowed: Path, longrope: Path
) -> None:
    for folder, lengths in ((checkpoint, (5, 70)), (windowed, (2040,)), (longrope, (20, 31, 40))):
        for engine in _engines(folder):
            for length in lengths:
                steps, largest = _greedy(engine, _tokens(length), 16)
                assert steps == largest, (type(engine).__name__, folder.name, length)


def test_a_session_that_answered_greedily_is_rewound_like_any_other(checkpoint: Path) -> None:
    prompt, other = _tokens(80), _tokens(30, seed=1)
    for engine in _engines(checkpoint):
        session = engine.open(400)
        session.extend(prompt)
        token = None
        for _ in range(20):
            token = session.follow(token)
        session.rewind(len(prompt))
        session.extend(other)
        cold = _run(engine, prompt + other, [len(prompt), len(prompt + other)])
        assert np.array_equal(session.logits(), cold), type(engine).__name__


def test_a_window_that_is_missing_from_the_graph_bounds_the_context(windowed: Path) -> None:
    folder = windowed.with_name("without")
    shutil.copytree(exported(windowed), folder)
    file = folder / "genai_config.json"
    config = json.loads(file.read_text())
    assert "sliding_window" not in config["model"]["decoder"]  # its cache holds everything
    config["model"]["decoder"]["sliding_window"] = {
        "window_size": 2047,
        "slide_key_value_cache": False,
        "slide_inputs": False,
        "layers": [],
        "cache_slack": 0,
    }
    file.write_text(json.dumps(config))
    assert GenaiEngine(folder, EngineSettings(threads=1)).context == 2047


def test_a_session_is_kept_beyond_the_window_only_where_its_cache_holds_everything(
    windowed: Path,
) -> None:
    genai, torch_engine = _engines(windowed)
    tokens, other = _tokens(2100), _tokens(64, seed=1)
    session = torch_engine.open(2200)
    session.extend(tokens)
    assert not session.reusable
    session = genai.open(2200)
    session.extend(tokens)
    assert session.reusable
    session.rewind(2060)
    session.extend(other)
    expected = _reference(windowed, tokens[:2060] + other)
    assert np.abs(session.logits() - expected).max() < CLOSE


def test_a_model_without_longrope_has_no_switch(onnx_dir: Path) -> None:
    assert rope_switch(onnx_dir) == 0


def test_a_rewound_session_computes_to_the_last_bit_what_a_new_one_does(checkpoint: Path) -> None:
    shared, one, other = _tokens(200), _tokens(90, seed=1), _tokens(130, seed=2)
    for engine in _engines(checkpoint):
        ends = cuts(shared + other, engine.ends, 64, 0)
        cold = _run(engine, shared + other, ends)
        session = engine.open(1000)
        session.extend(shared[:64])
        session.extend(shared[64:128])
        session.extend(shared[128:192])
        session.extend((shared + one)[192:])
        for token in one[:20]:
            session.extend([token])
        session.rewind(192)
        done = 192
        for end in (end for end in ends if end > 192):
            session.extend((shared + other)[done:end])
            done = end
        assert np.array_equal(session.logits(), cold), type(engine).__name__


def test_both_engines_read_conversations_and_texts_alike(checkpoint: Path) -> None:
    onnx, torch = _engines(checkpoint)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": 'Hé "you" \\ {%x%} \n 😀'},
    ]
    assert onnx.render(messages) == torch.render(messages)
    text = "<|user|>a<|end|><|assistant|>"
    assert onnx.encode(text) == torch.encode(text) == [3, *onnx.encode("a"), 2, 4]
    assert onnx.ends == torch.ends == frozenset({2})
    assert onnx.context == torch.context == CONTEXT
    assert onnx.token_bytes == torch.token_bytes


def test_a_first_token_from_template_and_tokenizer_is_there_once(twice_bos: Path) -> None:
    message = [{"role": "user", "content": "a"}]
    for engine in _engines(twice_bos):
        assert engine.render(message)[:2] == [1, 3], type(engine).__name__


def test_characters_of_several_tokens_come_out_whole(checkpoint: Path) -> None:
    text = "naïve 中文 😀 end"
    for engine in _engines(checkpoint):
        decode = engine.decoder()
        pieces = [decode(token) for token in engine.encode(text)]
        assert "".join(pieces) == text
        assert len(pieces) > len(text), "the tokens of this vocabulary are bytes"
        assert all("�" not in piece for piece in pieces)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (EngineSettings(provider="tpu"), "provider"),
        (EngineSettings(max_context=CONTEXT + 1), "max_context"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(
    checkpoint: Path, settings: EngineSettings, says: str
) -> None:
    makers: list[Any] = [
        lambda: GenaiEngine(exported(checkpoint), settings),
        lambda: TorchEngine(checkpoint, checkpoint, settings),
    ]
    for make in makers:
        with pytest.raises(ValueError, match=f"model_config {says}"):
            make()


def test_cuda_is_refused_where_it_is_not_installed(checkpoint: Path) -> None:
    import onnxruntime_genai as og

    if og.is_cuda_available():
        pytest.skip("this onnxruntime-genai has CUDA")
    with pytest.raises(ValueError, match="onnxruntime-genai-cuda"):
        GenaiEngine(exported(checkpoint), EngineSettings(provider="cuda"))
