"""Tiny models behind both flavors, logged once for all tests of this folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.pyfunc import PyFuncModel

from phi3_mlflow.flavors.onnx import log_onnx
from phi3_mlflow.flavors.transformers import log_transformers
from phi3_mlflow.genai.export import export_onnx
from tests.fixtures.tiny_phi3 import make_tiny

CONTEXT = 6144


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Phi-3 with room for more than 4,096 tokens."""
    return make_tiny(
        tmp_path_factory.mktemp("chat") / "checkpoint",
        sliding_window=None,
        max_position_embeddings=CONTEXT,
    )


@pytest.fixture(scope="session")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the attention window of Phi-3-mini-4k, in every layer."""
    return make_tiny(
        tmp_path_factory.mktemp("windowed") / "checkpoint",
        max_position_embeddings=CONTEXT,
        layer_types=["sliding_attention"] * 2,
    )


@pytest.fixture(scope="session")
def longrope(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LongRoPE model that changes its factors beyond 32 tokens."""
    return make_tiny(tmp_path_factory.mktemp("longrope") / "checkpoint", "phi-3-mini-128k")


@pytest.fixture(scope="session")
def twice_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose template writes the first token and whose tokenizer adds it as well."""
    folder = make_tiny(tmp_path_factory.mktemp("bos") / "checkpoint")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text("{{ bos_token }}" + template)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [
            {"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    file.write_text(json.dumps(tokenizer))
    return folder


def exported(checkpoint: Path) -> Path:
    """The fp32 export of a tiny checkpoint, made once."""
    folder = checkpoint.with_name("onnx")
    if not folder.exists():
        export_onnx(checkpoint, folder, precision="fp32")
    return folder


@pytest.fixture(scope="session")
def onnx_dir(checkpoint: Path) -> Path:
    return exported(checkpoint)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Address of a tracking store of the tests' own, with an experiment `chat` in it."""
    folder = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{folder}/mlflow.db"
    client = mlflow.MlflowClient(uri)
    client.create_experiment("chat", artifact_location=(folder / "artifacts").as_uri())
    return uri


@pytest.fixture(autouse=True)
def _tracking(store: str) -> Iterator[None]:
    with tracking(store):
        yield


class tracking:
    """Use a store and its experiment `chat`, and put things back afterwards."""

    def __init__(self, uri: str) -> None:
        self._uri = uri

    def __enter__(self) -> None:
        self._before = mlflow.get_tracking_uri()
        mlflow.set_tracking_uri(self._uri)
        mlflow.set_experiment("chat")

    def __exit__(self, *_: object) -> None:
        mlflow.set_tracking_uri(self._before)


@pytest.fixture(scope="session")
def onnx_info(store: str, onnx_dir: Path) -> Any:
    with tracking(store):
        return log_onnx(onnx_dir, name="tiny", model_config={"threads": 1})


@pytest.fixture(scope="session")
def prompt_info(store: str, onnx_dir: Path) -> Any:
    with tracking(store):
        return log_onnx(onnx_dir, name="tiny", contract="prompt", model_config={"threads": 1})


@pytest.fixture(scope="session")
def transformers_info(store: str, checkpoint: Path) -> Any:
    with tracking(store):
        return log_transformers(
            checkpoint,
            name="tiny",
            dtype="float32",
            model_card="# Tiny\n",
            license_text="Do what you like.\n",
        )


@pytest.fixture(scope="session")
def onnx_model(store: str, onnx_info: Any) -> PyFuncModel:
    with tracking(store):
        return mlflow.pyfunc.load_model(onnx_info.model_uri)


@pytest.fixture(scope="session")
def prompt_model(store: str, prompt_info: Any) -> PyFuncModel:
    with tracking(store):
        return mlflow.pyfunc.load_model(prompt_info.model_uri)


@pytest.fixture(scope="session")
def transformers_model(store: str, transformers_info: Any) -> PyFuncModel:
    with tracking(store):
        return mlflow.pyfunc.load_model(transformers_info.model_uri)


@pytest.fixture(params=["onnx", "transformers"])
def model(request: pytest.FixtureRequest) -> PyFuncModel:
    """Each flavor in turn: what is asserted of it holds for both."""
    return request.getfixturevalue(f"{request.param}_model")
