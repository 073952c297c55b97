"""Tiny models behind both flavors, logged once for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.pyfunc import PyFuncModel

from phi3_mlflow.flavors.onnx import log_onnx
from phi3_mlflow.flavors.transformers import log_transformers
from tests.fixtures.tiny_checkpoints import checkpoint, onnx_dir, twice_bos, windowed

__all__ = ["checkpoint", "onnx_dir", "twice_bos", "windowed"]


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
