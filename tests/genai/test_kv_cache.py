"""Keys and values in int8."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from phi3_mlflow.flavors.onnx import rope_switch
from phi3_mlflow.genai.export import export_onnx
from phi3_mlflow.genai.kept import kv_cache
from phi3_mlflow.genai.kv_cache import most_of_keys, scale
from phi3_mlflow.quantization.quantize import quantize_checkpoint
from phi3_mlflow.quantization.settings import RtnSettings
from phi3_mlflow.runtime.engine import EngineSettings
from phi3_mlflow.runtime.engine_batch import BatchEngine
from phi3_mlflow.runtime.engine_genai import GenaiEngine
from tests.fixtures.tiny_phi3 import ARCHITECTURES, make_tiny

TEXTS = np.random.default_rng(0).integers(6, 260, (4, 64)).tolist()


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def both(request: pytest.FixtureRequest, tmp_path_factory) -> tuple[Path, Path]:
    """The same model with memory in float32 and in int8."""
    place = tmp_path_factory.mktemp(request.param)
    checkpoint = make_tiny(place / "checkpoint", request.param)
    quantize_checkpoint(checkpoint, place / "int4", RtnSettings(block_size=16))
    for name, texts in (("float32", ()), ("int8", TEXTS)):
        export_onnx(place / "int4", place / name, precision="int4", kv_sequences=texts)
    return place / "float32", place / "int8"


def _logits(directory: Path, pieces: list[list[int]], **settings: int) -> np.ndarray:
    """What comes after each piece of a text."""
    switch = rope_switch(directory)
    known = EngineSettings(threads=1, rope_switch=switch, kv_cache=kv_cache(directory), **settings)
    engine = (BatchEngine if known.batch > 1 else GenaiEngine)(directory, known)
    session = engine.open(sum(map(len, pieces)) + 8)
    found = []
    for piece in pieces:
        session.extend(piece)
        found.append(session.logits().copy())
    return np.array(found)


def _divergence(one: np.ndarray, other: np.ndarray) -> float:
    """Mean KL, in nats."""
    p, q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (one, other))
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


def test_the_graph_keeps_int8_and_says_nearly_the_same(both: tuple[Path, Path]) -> None:
    plain, small = both
    assert (kv_cache(plain), kv_cache(small)) == ("float32", "int8")
    text = np.random.default_rng(1).integers(6, 260, 100).tolist()
    pieces = [text[:20], text[20:26], *([token] for token in text[26:])]
    divergence = _divergence(_logits(plain, pieces), _logits(small, pieces))
    assert 0 < divergence < 0.02


def test_many_at_once_have_it_too(both: tuple[Path, Path]) -> None:
    text = np.random.default_rng(2).integers(6, 260, 22).tolist()
    pieces = [text[:16], text[16:18], *([token] for token in text[18:])]
    alone, together = _logits(both[1], pieces), _logits(both[1], pieces, batch=2)
    assert _divergence(alone, together) < 1e-3


def test_memory_is_counted_as_a_quarter(both: tuple[Path, Path]) -> None:
    plain, small = (
        GenaiEngine(folder, EngineSettings(threads=1, kv_cache=kv_cache(folder))).token_bytes
        for folder in both
    )
    assert plain == 4 * small


def test_the_same_bytes_twice(both: tuple[Path, Path], tmp_path: Path) -> None:
    export_onnx(both[1].parent / "int4", tmp_path, precision="int4", kv_sequences=TEXTS)
    for name in ("model.onnx", "model.onnx.data", "genai_config.json"):
        assert (tmp_path / name).read_bytes() == (both[1] / name).read_bytes(), name


@given(arrays(np.float32, (2, 5), elements=st.floats(0, 1e4, width=32)))
def test_scales_reach_what_they_were_taken_from(largest: np.ndarray) -> None:
    found = scale(largest)
    assert (np.ceil(largest / found) <= 127.001).all()
    # ... and by no more than a step beyond it.
    small = largest > 1e-5
    assert (found[small] * 127 <= largest[small] * 2 ** (1 / 8) * 1.0001).all()


@given(
    arrays(np.float32, (2, 3, 8), elements=st.floats(-10, 10, width=32)),
    st.sampled_from([2, 4, 8]),
    st.floats(-6.3, 6.3),
)
def test_no_position_takes_a_key_beyond_it(keys: np.ndarray, rotated: int, angle: float) -> None:
    half = rotated // 2
    first, second = keys[..., :half], keys[..., half:rotated]
    turned = keys.copy()
    turned[..., :half] = first * np.cos(angle) - second * np.sin(angle)
    turned[..., half:rotated] = second * np.cos(angle) + first * np.sin(angle)
    most = most_of_keys(keys, rotated)
    assert (np.abs(turned).max(axis=1) <= most * 1.001 + 1e-4).all()
