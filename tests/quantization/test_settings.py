from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from phi3_mlflow.quantization.settings import (
    ALGORITHMS,
    GptqSettings,
    KQuantMixedSettings,
    KQuantSettings,
    RtnSettings,
    quantization_settings,
)


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
        quantization_settings(values)


def test_preferences_of_the_algorithms() -> None:
    assert RtnSettings().is_symmetric()
    assert not KQuantSettings().is_symmetric()
    assert not RtnSettings(symmetric=False).is_symmetric()
    mixed = KQuantMixedSettings()
    assert mixed.projections_in_int8() == ("qkv_proj", "down_proj")
    assert mixed.head_bits() == 8
    assert KQuantSettings().head_bits() == 4
    assert KQuantSettings(head="int8").head_bits() == 8


def test_some_layers_are_those_of_the_builder() -> None:
    chosen = KQuantMixedSettings().layers_in_int8(30)
    assert sorted(chosen) == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29]
    assert KQuantMixedSettings(mixed_layers="all").layers_in_int8(3) == {0, 1, 2}
    assert KQuantMixedSettings(mixed_layers=(2,)).layers_in_int8(3) == {2}


# What recipes of version 0.1.0 hold: the settings of all algorithms, whatever the algorithm.
FLAT = {
    "block_size": 32,
    "symmetric": None,
    "int8_projections": None,
    "mixed_layers": "some",
    "int8_block_size": None,
    "block_sizes": {},
    "head": "auto",
    "embedding": "auto",
    "accuracy_level": 4,
    "calibration": None,
    "calibration_tokens": 16384,
    "calibration_length": 512,
    "damping": 0.01,
    "drift_correction": 0.0,
    "threads": 2,
    "backend": "streaming",
}
COMMON = {
    "block_size": st.sampled_from([16, 32, 64, 128, 256]),
    "symmetric": st.none() | st.booleans(),
    "int8_block_size": st.none() | st.sampled_from([16, 64]),
    "block_sizes": st.dictionaries(st.sampled_from(["down_proj", "lm_head"]), st.just(64)),
    "head": st.sampled_from(["auto", "int4", "int8"]),
    "embedding": st.sampled_from(["auto", "shared", "fp32", "int4", "int8"]),
    "accuracy_level": st.integers(0, 4),
}


@given(
    algorithm=st.sampled_from(sorted(ALGORITHMS)),
    chosen=st.fixed_dictionaries({}, optional=COMMON),
    without_none=st.booleans(),
    left_out=st.sets(st.sampled_from(sorted(FLAT))),
)
def test_a_recipe_that_lists_the_settings_of_all_algorithms_loads(
    algorithm: str, chosen: dict[str, object], without_none: bool, left_out: set[str]
) -> None:
    values = {"algorithm": algorithm, **FLAT, **chosen}
    values = {key: value for key, value in values.items() if key not in left_out - chosen.keys()}
    if algorithm == "gptq":
        values["calibration"] = "texts.jsonl"
    if without_none:
        values = {key: value for key, value in values.items() if value is not None}
    settings = quantization_settings(values)
    assert type(settings) is ALGORITHMS[algorithm]
    dumped = settings.model_dump(mode="json")
    assert quantization_settings(dumped) == settings
    for key, value in {**FLAT, **values}.items():
        if key in dumped:
            assert dumped[key] == value, key


@given(
    algorithm=st.sampled_from(["rtn", "k_quant", "k_quant_mixed"]),
    foreign=st.sampled_from(
        [
            ("calibration_tokens", 4096),
            ("calibration_length", 64),
            ("damping", 0.02),
            ("drift_correction", 1.0),
            ("threads", 4),
        ]
    ),
)
def test_a_setting_of_another_algorithm_is_refused_by_name(
    algorithm: str, foreign: tuple[str, float]
) -> None:
    name, value = foreign
    with pytest.raises(ValidationError) as caught:
        quantization_settings({"algorithm": algorithm, name: value})
    (problem,) = caught.value.errors()
    assert problem["loc"] == (algorithm, name)
    assert problem["msg"].startswith(f"{name} belongs to algorithm gptq; leave it out or choose")
    assert f"Allowed for {algorithm}: block_size, " in problem["msg"]


def test_a_setting_of_two_others_names_both() -> None:
    with pytest.raises(ValidationError, match="belongs to algorithm k_quant_mixed or gptq"):
        RtnSettings.model_validate({"mixed_layers": "all"})


def test_all_that_is_wrong_is_said_together() -> None:
    values = {"algorithm": "rtn", "damping": 0.5, "block_size": 3, "colour": 1, "head": "int8"}
    with pytest.raises(ValidationError) as caught:
        quantization_settings(values)
    assert {problem["loc"][-1] for problem in caught.value.errors()} == {
        "damping", "block_size", "colour",
    }  # fmt: skip


def test_settings_that_name_no_algorithm_are_the_default_ones() -> None:
    assert quantization_settings({}) == KQuantMixedSettings()
    assert quantization_settings({"block_size": 64}) == KQuantMixedSettings(block_size=64)


def test_an_algorithm_takes_texts_or_says_that_it_does_not() -> None:
    assert RtnSettings().calibration is None
    assert "calibration" not in RtnSettings().model_dump()
    assert GptqSettings(calibration=Path("texts.txt")).calibration == Path("texts.txt")


@pytest.mark.parametrize("settings", ALGORITHMS.values())
def test_every_setting_says_what_it_is(settings: type[RtnSettings]) -> None:
    assert settings.__doc__
    assert all(field.description for field in settings.model_fields.values())
