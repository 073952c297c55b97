"""What MLflow's own chat wrapper of the transformers flavor does wrong, and that ours does not.

The first assertions of each test pin MLflow 3.17.2: when one of them fails, the wrapper was mended,
and docs/chat-contract.md says what to simplify.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
import torch
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PyFuncModel

SPAIN = {"messages": [{"role": "user", "content": "What is the capital of Spain?"}]}


def _log(checkpoint: Path) -> Any:
    return mlflow.transformers.log_model(
        transformers_model=str(checkpoint),
        name="plain",
        task="llm/v1/chat",
        torch_dtype=torch.float32,
        pip_requirements=["mlflow"],
    )


@pytest.fixture(scope="module")
def copied(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "checkpoint"
    shutil.copytree(checkpoint, folder)
    return folder


@pytest.fixture
def plain(copied: Path) -> PyFuncModel:
    """The model as MLflow's `log_model` alone leaves it."""
    return mlflow.pyfunc.load_model(_log(copied).model_uri)


def test_the_answer_is_an_object_not_a_list(
    plain: PyFuncModel, transformers_model: PyFuncModel
) -> None:
    assert isinstance(plain.predict({**SPAIN, "max_tokens": 3}), list)
    assert isinstance(transformers_model.predict({**SPAIN, "max_tokens": 3}), dict)


def test_the_model_is_a_name_not_a_path(
    plain: PyFuncModel, transformers_model: PyFuncModel, copied: Path
) -> None:
    assert plain.predict({**SPAIN, "max_tokens": 3})[0]["model"] == str(copied)
    assert transformers_model.predict({**SPAIN, "max_tokens": 3})["model"] == "tiny"


def test_temperature_zero_is_greedy_not_an_error(
    plain: PyFuncModel, transformers_model: PyFuncModel
) -> None:
    zero = {**SPAIN, "max_tokens": 3, "temperature": 0.0}
    with pytest.raises(Exception, match="temperature"):
        plain.predict({**zero, "custom_inputs": None})
    assert transformers_model.predict(zero)["choices"]


def test_stop_works_where_the_checkpoint_of_the_logging_machine_is_gone(
    checkpoint: Path, transformers_model: PyFuncModel, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, elsewhere)
    model = mlflow.pyfunc.load_model(_log(elsewhere).model_uri)
    shutil.rmtree(elsewhere)
    wanted = {**SPAIN, "max_tokens": 3, "stop": ["zzz"]}
    with pytest.raises(Exception, match=r"tokenizer|repo|checkpoint"):
        model.predict(wanted)
    assert transformers_model.predict(wanted)["choices"]


def test_the_first_token_is_not_doubled(twice_bos: Path, request: pytest.FixtureRequest) -> None:
    from phi3_mlflow.flavors.transformers import log_transformers

    messages = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    model = mlflow.transformers.load_model(_log(twice_bos).model_uri)
    text = model.tokenizer.apply_chat_template(
        messages["messages"], tokenize=False, add_generation_prompt=True
    )
    assert model.tokenizer(text)["input_ids"][:2] == [1, 1], "what MLflow's wrapper feeds the model"
    ours = mlflow.pyfunc.load_model(
        log_transformers(twice_bos, name="tiny", dtype="float32").model_uri
    )
    # beginning, user, letter, end, assistant
    assert ours.predict(messages)["usage"]["prompt_tokens"] == 5


def test_an_answer_cut_by_its_length_says_so(checkpoint: Path, tmp_path: Path) -> None:
    """MLflow knows of a length only when the request names it, not of the model's own limit."""
    from phi3_mlflow.flavors.transformers import log_transformers

    limited = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, limited)
    file = limited / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "max_new_tokens": 3}))
    (answer,) = mlflow.pyfunc.load_model(_log(limited).model_uri).predict(SPAIN)
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["choices"][0]["finish_reason"] == "stop"
    info = log_transformers(limited, name="tiny", dtype="float32", model_config={"max_tokens": 3})
    ours = mlflow.pyfunc.load_model(info.model_uri).predict(SPAIN)
    assert ours["usage"]["completion_tokens"] == 3
    assert ours["choices"][0]["finish_reason"] == "length"


def test_each_row_has_its_own_parameters(
    plain: PyFuncModel, transformers_model: PyFuncModel
) -> None:
    rows = pd.DataFrame([{**SPAIN, "max_tokens": n} for n in (2, 4)])

    def counted(answers: list[Any]) -> list[int]:
        return [answer["usage"]["completion_tokens"] for answer in answers]

    assert counted(plain.predict(rows)) == [2, 2]
    assert counted(transformers_model.predict(rows)) == [2, 4]


def test_every_choice_is_answered(plain: PyFuncModel, transformers_model: PyFuncModel) -> None:
    two = {**SPAIN, "max_tokens": 2, "n": 2}
    with pytest.raises(
        MlflowException, match="params provided to the `predict` method are not valid"
    ):
        plain.predict(two)
    assert len(transformers_model.predict(two)["choices"]) == 2
