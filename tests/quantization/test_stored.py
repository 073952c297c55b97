from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from phi3_mlflow.core.errors import CheckpointRefused
from phi3_mlflow.quantization.stored import StoredQuantization

GOOD = {"quant_method": "gptq", "bits": 4, "group_size": 32}


def read(**stored: Any) -> StoredQuantization | None:
    return StoredQuantization.read({"quantization_config": stored}, Path("model"))


def test_a_float_checkpoint_is_not_quantized() -> None:
    assert StoredQuantization.read({}, Path("model")) is None


def test_the_first_expression_that_matches_counts() -> None:
    layers = r"+:model\.layers\.(0|2)\.self_attn"
    stored = read(
        **GOOD,
        dynamic={
            "-:model.layers.1.self_attn": {},
            layers: {"bits": 8},
            "+:model": {"group_size": 64},
        },
    )
    assert stored is not None
    assert stored.layout_of("model.layers.0.self_attn.qkv_proj") == (8, 32)
    assert stored.layout_of("model.layers.1.self_attn.qkv_proj") == (4, 64)
    assert stored.layout_of("lm_head") == (4, 32)
    assert (stored.embedding_bits, stored.shared_embedding) == (0, False)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"quant_method": "awq"}, "quant_method is 'awq'; this reads gptq"),
        ({"checkpoint_format": "gptq_v2"}, "zero points are stored differently"),
        ({"desc_act": True}, "desc_act"),
        ({"bits": None}, "whole numbers are needed"),
        ({"group_size": "32"}, "whole numbers are needed"),
    ],
)
def test_what_is_not_read_here_is_refused(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointRefused, match="model: ") as caught:
        read(**{**GOOD, **changed})
    assert words in str(caught.value)
