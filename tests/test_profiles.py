from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from phi3_mlflow.config.loading import load_profile, profile_names
from phi3_mlflow.config.parameters import PARAMETERS, read_request
from phi3_mlflow.core.errors import EXIT_BAD_INPUT, UserError

GOOD = {
    "description": "a model",
    "base_model": "me/model",
    "licence": "MIT",
    "source": "file:model",
    "context_length": 128,
}


def write(folder: Path, **changes) -> str:
    file = folder / "mine.yaml"
    content = {k: v for k, v in {**GOOD, **changes}.items() if v is not None}
    file.write_text(yaml.safe_dump(content))
    return str(file)


@pytest.mark.parametrize("name", profile_names())
def test_the_profiles_that_come_with_the_project_are_valid_and_pinned(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == profile.registered_model == name
    assert profile.gate.thresholds
    if profile.source.startswith("hf:"):
        assert len(profile.source.rpartition("@")[2]) == 40
    else:
        assert profile.sha256


def test_a_profile_of_the_users_own_by_path(tmp_path: Path) -> None:
    profile = load_profile(write(tmp_path, registered_model="other"))
    assert (profile.name, profile.registered_model) == ("mine", "other")


def test_parameters_come_before_the_file(tmp_path: Path) -> None:
    values = {"profile": write(tmp_path), "algorithm": "rtn", "block_size": "64", "flavor": "auto"}
    request = read_request(("profile", "algorithm", "block_size", "flavor"), values)
    assert request.profile.quantization.algorithm == "rtn"
    assert request.profile.quantization.block_size == 64
    assert request.profile.flavor == "onnx"


def test_another_algorithm_does_not_inherit_what_was_meant_for_the_files_own(
    tmp_path: Path,
) -> None:
    (tmp_path / "texts.txt").write_text("text")
    quantization = {"algorithm": "gptq", "calibration": "texts.txt", "head": "int8"}
    name = write(tmp_path, quantization=quantization)
    chosen = load_profile(name).quantization
    assert chosen.calibration == tmp_path / "texts.txt"
    chosen = load_profile(name, {"quantization.algorithm": "rtn"}).quantization
    assert (chosen.algorithm, chosen.head, chosen.calibration) == ("rtn", "int8", None)


@pytest.mark.parametrize("algorithm", ["rtn", "k_quant", "k_quant_mixed", "gptq"])
def test_the_quantization_of_an_older_recipe_lists_the_settings_of_all_algorithms(
    tmp_path: Path, algorithm: str
) -> None:
    recorded = {
        "algorithm": algorithm, "block_size": 64, "mixed_layers": "some", "block_sizes": {},
        "head": "auto", "embedding": "auto", "accuracy_level": 4, "calibration_tokens": 16384,
        "calibration_length": 512, "damping": 0.01, "drift_correction": 0.0, "threads": 2,
        "backend": "streaming",
    }  # fmt: skip
    chosen = load_profile(write(tmp_path, quantization=recorded)).quantization
    assert (chosen.algorithm, chosen.block_size) == (algorithm, 64)
    assert load_profile(write(tmp_path, search={"candidates": {"a": recorded}})).search.candidates


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"quantization": {"algorithm": "rtm"}},
            "mine.yaml: quantization.algorithm = 'rtm': Input should be 'rtn', 'k_quant', "
            "'k_quant_mixed', 'gptq' or 'search'",
        ),
        (
            {"search": {"candidates": {"rtn": {"algorithm": "search"}}}},
            "search.candidates.rtn.algorithm = 'search': Input should be 'rtn', 'k_quant', "
            "'k_quant_mixed' or 'gptq'",
        ),
        (
            {"search": {"candidates": {"rtn": {"algorithm": "rtn", "blok_size": 16}}}},
            "unknown key search.candidates.rtn.blok_size; did you mean block_size? Allowed here: "
            "accuracy_level, algorithm, block_size,",
        ),
        (
            {"quantization": {"algorithm": "k_quant", "damping": 0.5}},
            "quantization.damping = 0.5: damping belongs to algorithm gptq",
        ),
        (
            {"quantization": {"algorithm": "rtn", "calibration": "texts.txt"}},
            "algorithm rtn takes no calibration; leave it out or choose gptq",
        ),
        (
            {"quantization": {"algorithm": "gptq", "damping": 2}},
            "mine.yaml: quantization.damping = 2: Input should be less than 1",
        ),
        ({"quantization": {"algorithm": None}}, "quantization.algorithm = None: Input should be"),
        ({"quantization": {"algorithm": []}}, "quantization.algorithm = []: Input should be"),
    ],
)
def test_a_problem_with_a_quantization_names_the_key_in_the_file(
    tmp_path: Path, changes: dict, words: str
) -> None:
    assert words in refusal(write(tmp_path, **changes))


def test_an_unknown_algorithm_of_a_parameter_is_the_parameters() -> None:
    message = refusal("smollm2-135m", algorithm="x")
    assert "parameter: quantization.algorithm = 'x': Input should be 'rtn'" in message
    assert "'search'" in message


def test_gptq_without_texts_takes_those_that_come_with_the_project(tmp_path: Path) -> None:
    chosen = load_profile(write(tmp_path), {"quantization.algorithm": "gptq"}).quantization
    assert chosen.calibration is not None
    assert chosen.calibration.name == "calibration.jsonl"
    assert chosen.calibration.is_file()


def refusal(name: str, **values: str) -> str:
    with pytest.raises(UserError) as caught:
        read_request(PARAMETERS, {"profile": name, **values})
    assert caught.value.exit_code == EXIT_BAD_INPUT
    return str(caught.value)


def test_an_unknown_profile_names_those_there_are() -> None:
    message = refusal("smollm2-135")
    assert "Did you mean smollm2-135m" in message
    for name in profile_names():
        assert name in message


def test_everything_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        context_length="long",
        licence=None,
        flavour="onnx",
        quantization={"algoritm": "rtn", "block_size": 31},
        gate={"thresholds": {"beauty": {"min": 1}}},
    )
    message = refusal(file, precision="int3", quiet="maybe")
    for words in (
        "context_length = 'long'",
        "licence is missing",
        "unknown key flavour",
        "did you mean flavor",
        "unknown key quantization.algoritm",
        "quantization.block_size = 31",
        "unknown metric beauty",
        "parameter: precision = 'int3'",
        "parameter: quiet = 'maybe'",
    ):
        assert words in message, words
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"contract": "prompt", "flavor": "transformers"}, "contract 'prompt' needs flavor 'onnx'"),
        ({"runtime": {"max_context": 4096}}, "beyond the model's context_length 128"),
        ({"runtime": {"provider": "cuda"}, "precision": "fp32"}, "'cuda' needs precision 'int4'"),
        ({"runtime": {"provider": "cuda", "kv_cache": "int8"}}, "'int8' is for provider 'cpu'"),
        ({"source": "gopher:x"}, "gopher"),
        ({"gate": {"thresholds": {"kl_mean": {}}}}, "give min, max or both"),
        ({"gate": {"thresholds": {"kl_mean": {"min": 2, "max": 1}}}}, "min 2.0 is above max 1.0"),
        ({"gate": {"thresholds": {"judge.polite": {"min": 1}}}}, "evaluation.judge is not set"),
        ({"gate": {"champion": {"judge.polite": {"by": 1}}}}, "unknown metric judge.polite"),
        ({"evaluation": {"judge": {"model": "gpt"}}}, "evaluation.judge.model = 'gpt'"),
        (
            {"evaluation": {"judge": {"model": "openai:/m", "correctness": False}}},
            "nothing to judge",
        ),
        (
            {
                "evaluation": {"judge": {"model": "openai:/m", "guidelines": {"kind": "Be kind."}}},
                "gate": {"thresholds": {"judge.polite": {"min": 1}}},
            },
            "no judge gives judge.polite; known: judge.correctness, judge.kind",
        ),
        ({"sha256": {"file": "abc"}}, "sha256.file"),
        ({"quantization": "rtn"}, "quantization"),
    ],
)
def test_what_cannot_go_together_is_refused(tmp_path: Path, changes: dict, words: str) -> None:
    assert words in refusal(write(tmp_path, **changes))


@pytest.mark.parametrize("content", ["[1, 2]", "a: [", "", "\x00", "just text"])
def test_a_file_that_is_no_profile(tmp_path: Path, content: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    assert "bad.yaml" in refusal(str(file))


def test_an_empty_value_is_not_taken_for_a_default() -> None:
    assert "flavor is empty" in refusal("smollm2-135m", flavor=" ")


@given(st.text(max_size=30))
def test_no_profile_name_leads_to_a_traceback(name: str) -> None:
    if name in profile_names() or not name.isprintable():
        return
    with pytest.raises(UserError):
        load_profile(name or "x")


@given(
    st.dictionaries(
        st.sampled_from([*GOOD, "quantization", "gate", "runtime", "other", "sha256"]),
        st.none() | st.integers() | st.text(max_size=5) | st.lists(st.integers(), max_size=2)
        | st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
        max_size=6,
    )
)  # fmt: skip
def test_no_content_leads_to_a_traceback(tmp_path_factory: pytest.TempPathFactory, content) -> None:
    file = tmp_path_factory.mktemp("profiles") / "p.yaml"
    file.write_text(yaml.safe_dump({**GOOD, **content}))
    with contextlib.suppress(UserError):
        assert load_profile(str(file)).name == "p"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"source": "file:model"}, "needs a source hf:OWNER/NAME"),
        ({"source": "hf:me/model@" + "0" * 40}, "takes the place of what is after @"),
        ({"source": "hf:me/model@main"}, "leave out one of the two"),
        ({"source": "hf:me/model", "track": "0" * 40}, "is a commit, which does not move"),
        ({"source": "hf:me/model", "track": "../x"}, "neither a commit nor a branch"),
        ({"source": "hf:me/model", "sha256": {"a": "0" * 64}}, "sha256 pins them"),
    ],
)
def test_a_branch_to_follow_goes_with_a_hub_source_and_nothing_that_pins_it(
    tmp_path: Path, changes: dict, words: str
) -> None:
    with pytest.raises(UserError, match=r"mine\.yaml") as caught:
        load_profile(write(tmp_path, **{"track": "main", **changes}))
    assert words in str(caught.value)


def test_a_followed_branch_is_part_of_the_origin(tmp_path: Path) -> None:
    profile = load_profile(write(tmp_path, source="hf:me/model", track="release/v2"))
    assert profile.origin == "hf:me/model@release/v2"
    assert load_profile(write(tmp_path)).origin == "file:model"


@pytest.mark.parametrize("name", [name for name in profile_names() if name.startswith("phi")])
def test_full_size_profiles_say_how_rows_are_trained_on_and_have_none(name: str) -> None:
    assert load_profile(name).train is None
    train = load_profile(name, {"train.data": "/rows.jsonl"}).train
    assert train is not None
    assert train.data == Path("/rows.jsonl")
    assert train.gradient_checkpointing
    assert train.per_device_train_batch_size == 1


def test_a_section_train_without_rows_is_checked(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.learning_rate"):
        load_profile(write(tmp_path, train={"learning_rate": -1}))
    with pytest.raises(UserError, match=r"train\.rows"):
        load_profile(write(tmp_path, train={"rows": "a.jsonl"}))
    assert load_profile(write(tmp_path, train={"learning_rate": 0.1})).train is None


def test_the_tickets_profile_is_the_default_with_rows_to_train_on() -> None:
    tickets, default = load_profile("smollm2-135m-tickets"), load_profile("smollm2-135m")
    for key in ("source", "sha256", "quantization", "context_length", "precision", "licence"):
        assert getattr(tickets, key) == getattr(default, key), key
    assert default.train is None
    assert tickets.train is not None
    assert isinstance(tickets.train.data, Path)
    assert sorted(file.name for file in tickets.train.data.iterdir()) == ["tickets.jsonl"]


def test_a_text_is_cut_into_pieces_that_the_model_takes_in(tmp_path):
    text = "description: d\nbase_model: b\nlicence: MIT\nsource: file:m\ncontext_length: 256\n"
    file = tmp_path / "small.yaml"
    file.write_text(text)
    assert load_profile(str(file)).window == 256
    file.write_text(text + "runtime: {max_context: 128}\n")
    assert load_profile(str(file)).window == 128
    assert load_profile("phi-3-mini-4k").window == 512
