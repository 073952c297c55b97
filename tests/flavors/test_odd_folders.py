"""Both flavors, logged into and loaded from a store in a folder with an odd name."""

from __future__ import annotations

from pathlib import Path

import mlflow
import pytest

from phi3_mlflow.flavors.onnx import log_onnx
from phi3_mlflow.flavors.transformers import log_transformers
from phi3_mlflow.tracking.connection import connect
from phi3_mlflow.tracking.stored_files import trouble, whole_files
from tests.conftest import own_store

pytestmark = pytest.mark.slow

REQUEST = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


@pytest.mark.parametrize("name", ["a b#c", "100% ü'x'"])
def test_models_are_logged_and_loaded(
    name: str, checkpoint: Path, onnx_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    with own_store(folder):
        connect()
        logged = (
            log_onnx(onnx_dir, name="tiny"),
            log_transformers(checkpoint, name="tiny", dtype="float32"),
        )
        for info in logged:
            assert trouble(info.model_id) is None
            files = whole_files(info.model_uri)
            assert files.is_relative_to(folder), files
            model = mlflow.pyfunc.load_model(info.model_uri)
            assert model.predict(REQUEST)["usage"]["completion_tokens"] <= 2
    inside = {path.name for path in tmp_path.iterdir()}
    assert inside == {name}, "nothing beside the folder"
