"""A tiny model logged once for all tests of this folder, and files of rows for it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pytest

from phi3_mlflow.flavors.onnx import log_onnx
from phi3_mlflow.flavors.transformers import log_transformers
from phi3_mlflow.genai.export import export_onnx
from tests.conftest import Workspace
from tests.fixtures.tiny_phi3 import make_tiny

NAME = "tiny"


@dataclass(frozen=True)
class Models:
    """A tracking store with tiny models in it; version 1 of `tiny` is the champion."""

    place: Workspace
    chat: str
    prompt: str
    transformers: str


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("scoring")
    place = Workspace(folder)
    checkpoint = make_tiny(folder / "checkpoint", sliding_window=None)
    onnx = folder / "onnx"
    export_onnx(checkpoint, onnx, precision="fp32")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(place.tracking_uri)
    try:
        client = mlflow.MlflowClient()
        experiment = client.create_experiment("models", (folder / "artifacts").as_uri())
        mlflow.set_experiment(experiment_id=experiment)
        chat = log_onnx(onnx, name=NAME).model_uri
        prompt = log_onnx(onnx, name=NAME, contract="prompt").model_uri
        transformers = log_transformers(checkpoint, name=NAME, dtype="float32").model_uri
        version = mlflow.register_model(chat, NAME)
        client.set_registered_model_alias(NAME, "champion", version.version)
    finally:
        mlflow.set_tracking_uri(before)
    return Models(place, chat, prompt, transformers)


@pytest.fixture
def store(models: Models, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Models]:
    """The store of `models`, in this process and in those it starts; the folder is a new one."""
    before = mlflow.get_tracking_uri()
    models.place.enter(monkeypatch)
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(models.place.tracking_uri)
    yield models
    mlflow.set_tracking_uri(before)


def write_jsonl(file: Path, rows: Iterable[Any]) -> Path:
    """One line a row: a text as it stands, bytes too, anything else as JSON."""
    with file.open("wb") as out:
        for row in rows:
            line = row if isinstance(row, bytes | str) else json.dumps(row)
            out.write((line if isinstance(line, bytes) else line.encode()) + b"\n")
    return file


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def questions(count: int) -> list[dict[str, Any]]:
    return [{"id": i, "prompt": f"Say {i} in other words."} for i in range(count)]
