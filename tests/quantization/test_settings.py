from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from phi3_mlflow.quantization.settings import QuantizationSettings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"algorithm": "gptq"}, "needs calibration"),
        ({"algorithm": "rtn", "calibration": Path("texts.jsonl")}, "takes no calibration"),
        ({"algorithm": "rtn", "int8_projections": ["qkv_proj"]}, "keeps every layer in int4"),
        ({"algorithm": "k_quant_mixed", "int8_projections": []}, "is k_quant"),
        ({"algorithm": "k_quant", "backend": "optimum"}, "gptq only"),
        ({"mixed_layers": [1, -1]}, "negative layer number"),
        ({"block_size": 48}, "block_size"),
        ({"accuracy_level": 5}, "accuracy_level"),
        ({"algoritm": "rtn"}, "algoritm"),
    ],
)
def test_what_does_not_go_together_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        QuantizationSettings.model_validate(values)


def test_preferences_of_the_algorithms() -> None:
    assert QuantizationSettings(algorithm="rtn").is_symmetric()
    assert not QuantizationSettings(algorithm="k_quant").is_symmetric()
    assert not QuantizationSettings(algorithm="rtn", symmetric=False).is_symmetric()
    mixed = QuantizationSettings(algorithm="k_quant_mixed")
    assert mixed.projections_in_int8() == ("qkv_proj", "down_proj")
    assert mixed.head_bits() == 8
    assert QuantizationSettings(algorithm="k_quant").head_bits() == 4
    assert QuantizationSettings(algorithm="k_quant", head="int8").head_bits() == 8


def test_some_layers_are_those_of_the_builder() -> None:
    chosen = QuantizationSettings().layers_in_int8(30)
    assert sorted(chosen) == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29]
    assert QuantizationSettings(mixed_layers="all").layers_in_int8(3) == {0, 1, 2}
    assert QuantizationSettings(mixed_layers=(2,)).layers_in_int8(3) == {2}
