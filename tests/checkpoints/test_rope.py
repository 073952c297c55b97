"""Every spelling of rotary settings is computed as transformers does, or refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3_mlflow.checkpoints.rope import read_rope, settled_rope
from phi3_mlflow.core.errors import CheckpointRefused
from phi3_mlflow.core.progress import no_progress
from phi3_mlflow.genai.export import export_onnx
from phi3_mlflow.sources.fetch import fetch_source
from phi3_mlflow.sources.spec import parse_source
from tests.fixtures.tiny_phi3 import make_tiny
from tests.sources.raw_checkpoint import tiny_config

SHORT, LONG = [1.0 + 0.05 * i for i in range(8)], [1.5 + 0.5 * i for i in range(8)]
FACTORS = {"short_factor": SHORT, "long_factor": LONG}
ORIGINAL = {"original_max_position_embeddings": 32, "max_position_embeddings": 256}
GONE = "gone"  # a key that is taken out of the configuration

TAKEN: dict[str, dict[str, Any]] = {
    "su, of 2024": {"rope_scaling": {"type": "su", **FACTORS}},
    "longrope": {"rope_scaling": {"type": "longrope", **FACTORS}},
    "rope_type alone": {"rope_scaling": {"rope_type": "longrope", **FACTORS}},
    "both types": {"rope_scaling": {"type": "su", "rope_type": "longrope", **FACTORS}},
    "rope_parameters": {
        "rope_scaling": GONE,
        "rope_theta": GONE,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 5000.0,
            "partial_rotary_factor": 1.0,
            "original_max_position_embeddings": 32,
            **FACTORS,
        },
    },
    "a factor": {"rope_scaling": {"type": "longrope", "factor": 32.0, **FACTORS}},
    "a small factor": {"rope_scaling": {"type": "longrope", "factor": 0.5, **FACTORS}},
    "an attention factor": {
        "rope_scaling": {"type": "longrope", "attention_factor": 1.3, **FACTORS}
    },
    "nulls": {
        "rope_scaling": {"type": "longrope", "factor": None, "attention_factor": None, **FACTORS},
        "partial_rotary_factor": None,
        "head_dim": None,
    },
    "a part of the head": {
        "rope_scaling": {"type": "longrope", **FACTORS},
        "partial_rotary_factor": 0.5,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    },
    "as long as before": {
        "rope_scaling": {"type": "longrope", **FACTORS},
        "original_max_position_embeddings": 256,
    },
    "no scaling, lengths that differ": {"rope_scaling": None},
    "no scaling, no original length": {
        "rope_scaling": None,
        "original_max_position_embeddings": GONE,
    },
    "default by name": {"rope_scaling": {"type": "default"}, "rope_theta": 500.0},
    "default under rope_parameters": {
        "rope_scaling": GONE,
        "rope_theta": GONE,
        "rope_parameters": {"rope_type": "default", "rope_theta": 700.0},
    },
    "keys of other models": {
        "rope_scaling": None,
        "rope_position_scale": 3.0,
        "ffn_hidden_size": 7,
        "seq_length": 9,
        "hidden_activation": "gelu",
    },
}  # fmt: skip

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "linear": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
    "dynamic": ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    "llama3": ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "'llama3'"),
    "yarn": ({"rope_scaling": {"type": "yarn", **FACTORS}}, "another arithmetic"),
    "two types": ({"rope_scaling": {"type": "longrope", "rope_type": "default"}}, "differ"),
    "no type": ({"rope_scaling": dict(FACTORS)}, "have no type"),
    "too short under rope_parameters": (
        {"rope_parameters": {"rope_type": "longrope", "short_factor": SHORT[:7],
                             "long_factor": LONG}},
        "short_factor has 7 factors, 8 are needed",
    ),
    "one list": ({"rope_scaling": {"type": "longrope", "long_factor": LONG}}, "is missing"),
    "a factor of zero": (
        {"rope_scaling": {"type": "longrope", "short_factor": [0.0, *SHORT[1:]],
                          "long_factor": LONG}},
        "not above 0",
    ),
    "an mscale that transformers ignores": (
        {"rope_scaling": {"type": "longrope", "short_mscale": 1.2, "long_mscale": 1.2, **FACTORS}},
        "state attention_factor",
    ),
    "two lengths": (
        {"rope_scaling": {"type": "longrope", "original_max_position_embeddings": 64, **FACTORS}},
        "transformers takes 32",
    ),
    "two sections": (
        {"rope_scaling": {"type": "longrope", **FACTORS}, "rope_parameters": {"type": "default"}},
        "only one of them can hold",
    ),
    "two bases": ({"rope_parameters": {"type": "default", "rope_theta": 5.0}}, "rope_theta"),
    "a stranger": ({"rope_scaling": {"type": "default", "beta_fast": 1}}, "beta_fast"),
    "an odd part": ({"rope_scaling": None, "partial_rotary_factor": 0.45}, "even number"),
    "no attention": (
        {"rope_scaling": {"type": "longrope", "attention_factor": 0, **FACTORS}},
        "attention_factor is 0",
    ),
    "heads of another size": (
        {"rope_scaling": {"type": "longrope", **FACTORS}, "head_dim": 32},
        "head_dim 32",
    ),
}  # fmt: skip


def _config(**more: Any) -> dict[str, Any]:
    config = {**tiny_config(), "num_key_value_heads": 4, **ORIGINAL, **more}
    return {
        key: value for key, value in config.items() if not isinstance(value, str) or value != GONE
    }


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("rope") / "plain", max_position_embeddings=256)


def _respelled(plain: Path, folder: Path, changes: dict[str, Any]) -> Path:
    shutil.copytree(plain, folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("rope_parameters", None)
    config |= {"rope_theta": 10000.0, "rope_scaling": None, "sliding_window": None, **ORIGINAL}
    config |= changes
    config = {key: value for key, value in config.items() if value != GONE}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _fetched(source: Path, out: Path) -> Path:
    out.mkdir()
    fetch_source(
        parse_source(f"file:{source}"),
        out,
        sha256={},
        base_dir=source,
        downloads=out.with_name(f"{out.name}-downloads"),
        progress=no_progress,
    )
    return out


@pytest.mark.parametrize("spelling", list(TAKEN))
def test_logits_equal_transformers_below_at_and_above_the_switch(
    plain: Path, tmp_path: Path, spelling: str
) -> None:
    from tests.genai.test_export import _load, _onnx_logits, _tokens, _torch_logits

    raw = _respelled(plain, tmp_path / "raw", TAKEN[spelling])
    checkpoint = _fetched(raw, tmp_path / "checkpoint")
    export_onnx(checkpoint, tmp_path / "onnx", precision="fp32")
    model = _load(checkpoint)
    for count in (20, 32, 33, 48):
        tokens = _tokens(count)
        wanted = _torch_logits(model, tokens)
        assert np.abs(_onnx_logits(tmp_path / "onnx", tokens) - wanted).max() < 1e-4, count


@pytest.mark.parametrize("spelling", list(REFUSED))
def test_other_settings_are_refused_at_the_fetch(
    plain: Path, tmp_path: Path, spelling: str
) -> None:
    changes, message = REFUSED[spelling]
    raw = _respelled(plain, tmp_path / "raw", changes)
    with pytest.raises(CheckpointRefused) as refused:
        _fetched(raw, tmp_path / "checkpoint")
    assert message in str(refused.value)
    assert refused.value.exit_code == 2


def test_what_the_runtime_cannot_turn_is_refused_for_onnx(plain: Path, tmp_path: Path) -> None:
    changes = {
        "rope_scaling": {"type": "longrope", "short_factor": SHORT[:4], "long_factor": LONG[:4]},
        "partial_rotary_factor": 0.5,
    }
    raw = _respelled(plain, tmp_path / "raw", changes)
    checkpoint = _fetched(raw, tmp_path / "checkpoint")
    with pytest.raises(CheckpointRefused, match=r"multiple of 16.*flavor: transformers"):
        export_onnx(checkpoint, tmp_path / "onnx", precision="fp32")


_NUMBERS = st.one_of(
    st.floats(0.25, 8), st.integers(1, 8), st.none(), st.sampled_from([-1.0, 0, True, "2"])
)
_LISTS = st.one_of(
    st.none(),
    st.lists(st.floats(0.5, 60), min_size=8, max_size=8),
    st.lists(st.floats(0.5, 60), min_size=6, max_size=9),
)
_TYPES = st.sampled_from(["longrope", "longrope", "su", "default", "linear", "yarn", None])
_WHOLE = st.sampled_from([GONE, 16, 32, 4096, None])
_PARTS = st.sampled_from([GONE, 1.0, 0.75, 0.5, None])
_SECTION = st.fixed_dictionaries(
    {"short_factor": _LISTS, "long_factor": _LISTS},
    optional={
        "type": _TYPES,
        "rope_type": _TYPES,
        "factor": _NUMBERS,
        "attention_factor": _NUMBERS,
        "rope_theta": st.sampled_from([10000.0, 500.0, None]),
        "partial_rotary_factor": st.sampled_from([1.0, 0.75]),
        "original_max_position_embeddings": st.sampled_from([16, 32]),
    },
)


@given(
    section=_SECTION,
    name=st.sampled_from(["rope_scaling", "rope_parameters"]),
    beside=st.fixed_dictionaries(
        {
            "original_max_position_embeddings": _WHOLE,
            "partial_rotary_factor": _PARTS,
            "rope_theta": st.sampled_from([GONE, 10000.0, 500.0]),
        }
    ),
)
def test_what_is_taken_is_what_transformers_computes(
    section: dict[str, Any], name: str, beside: dict[str, Any]
) -> None:
    from transformers import Phi3Config
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    config = _config(**{"rope_scaling": GONE, **beside, name: section})
    rope, problems = read_rope(config)
    assert (rope is None) == bool(problems)
    if rope is None:
        return
    settled, _ = settled_rope(config)
    assert read_rope(settled) == (rope, [])
    assert settled_rope(settled) == (settled, [])
    loaded = Phi3Config.from_dict(json.loads(json.dumps(settled)))
    embedding = Phi3RotaryEmbedding(loaded)
    steps = np.arange(0, rope.rotated, 2) / rope.rotated
    factors = np.array(rope.short_factor) if rope.long else 1.0
    wanted = 1 / (factors * rope.theta**steps)
    assert embedding.rope_type == ("longrope" if rope.long else "default")
    assert np.allclose(embedding.inv_freq.numpy(), wanted, rtol=1e-5)
    assert np.isclose(embedding.attention_scaling, rope.attention_factor)
    if rope.long:
        assert loaded.rope_parameters["original_max_position_embeddings"] == rope.original
