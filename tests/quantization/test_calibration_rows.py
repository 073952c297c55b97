"""Training rows among what GPTQ is calibrated with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phi3_mlflow.artifacts.manifests import sha256_of_file
from phi3_mlflow.artifacts.provenance import write_provenance
from phi3_mlflow.config.loading import load_profile
from phi3_mlflow.config.parameters import Request
from phi3_mlflow.core.errors import UserError
from phi3_mlflow.quantization.calibration import calibration_sequences
from phi3_mlflow.quantization.quantize import quantize_checkpoint
from phi3_mlflow.quantization.settings import GptqSettings, RtnSettings
from phi3_mlflow.rows.texts import Conversation
from phi3_mlflow.stages import quantize
from tests.fixtures.tiny_line import write_profile
from tests.fixtures.tiny_phi3 import make_tiny
from tests.steps.test_train_step import write_rows

TEXTS, ROWS, LENGTH = "b", "a", 32


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny") / "model")


def settings_for(folder: Path, **changes: Any) -> GptqSettings:
    texts = folder / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": TEXTS * 100}) + "\n" for _ in range(30)))
    values = {"calibration_tokens": 1024, "calibration_length": LENGTH, "block_size": 16, **changes}
    return GptqSettings(calibration=texts, **values)


def rows_of(count: int) -> list[Conversation]:
    return [[{"role": "user", "content": ROWS * 60}, {"role": "assistant", "content": ROWS * 9}]
            for _ in range(count)]  # fmt: skip


@given(st.floats(0, 1), st.integers(0, 40))
def test_rows_take_their_share_and_texts_the_rest(
    tiny: Path, tmp_path_factory: pytest.TempPathFactory, share: float, count: int
) -> None:
    settings = settings_for(tmp_path_factory.mktemp("texts"), calibration_rows=share)
    plain = calibration_sequences(tiny, settings)
    mixed = calibration_sequences(tiny, settings, rows_of(count))
    assert mixed.shape == plain.shape == (32, LENGTH)
    # The sequences of texts follow those of rows, none is half of each.
    of_rows = [i for i, one in enumerate(mixed) if not torch.isin(one, plain).all()]
    assert of_rows == list(range(len(of_rows)))
    assert len(of_rows) <= round(share * 1024 / LENGTH)
    if count >= 20:
        assert len(of_rows) == round(share * 1024 / LENGTH)
    assert torch.equal(mixed[len(of_rows) :], plain[: 32 - len(of_rows)])


def test_without_rows_nothing_is_otherwise(tiny: Path, tmp_path: Path) -> None:
    plain, half = settings_for(tmp_path), settings_for(tmp_path, calibration_rows=0.5)
    assert torch.equal(calibration_sequences(tiny, plain), calibration_sequences(tiny, half))


def test_rows_decide_the_bytes_and_the_same_give_the_same(tiny: Path, tmp_path: Path) -> None:
    half, found = settings_for(tmp_path, calibration_rows=0.5), []
    for name, rows in (("none", 0), ("one", 20), ("two", 20)):
        quantize_checkpoint(tiny, tmp_path / name, half, rows=rows_of(rows))
        found.append(sha256_of_file(tmp_path / name / "model.safetensors"))
    assert found[0] != found[1] == found[2]


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A checkpoint that says it was trained on rows.jsonl beside it."""
    rows = write_rows(tmp_path / "rows.jsonl", 0, 40)
    checkpoint = tmp_path / "trained"
    checkpoint.mkdir()
    known = {"data": {"sha256": sha256_of_file(rows), "files": {}}}
    training = {"settings": {"validation_share": 0.25, "format": "auto"}, "rows": known}
    write_provenance(checkpoint, {"training": training})
    return checkpoint


def asked(folder: Path, share: float | None, **changes: Any) -> Request:
    texts = settings_for(folder).calibration
    chosen = {"algorithm": "gptq", "calibration": str(texts)}
    if share is not None:
        chosen["calibration_rows"] = share
    profile = {"quantization": chosen, "train": {"data": "rows.jsonl"}, **changes}
    return Request(load_profile(str(write_profile(folder, **profile))), {})


def test_what_was_set_aside_is_not_calibrated_with(trained: Path, tmp_path: Path) -> None:
    rows = quantize.calibration_rows(asked(tmp_path, 0.5), trained)
    assert rows is not None
    known = json.loads((trained / "provenance.json").read_text())["training"]
    used = quantize.conversations(rows, known)
    assert 20 < len(used) < 38
    assert {row[0]["role"] for row in used} == {"user"}
    known["rows"]["validation"] = {"sha256": "0", "files": {}}  # a file of its own
    assert len(quantize.conversations(rows, known)) == 40


def test_other_rows_than_it_was_trained_on_are_refused(trained: Path, tmp_path: Path) -> None:
    request = asked(tmp_path, 0.5)
    write_rows(tmp_path / "rows.jsonl", 40, 41)
    with pytest.raises(UserError, match=r"no longer what .* was trained on"):
        quantize.calibration_rows(request, trained)
    assert quantize.calibration_rows(asked(tmp_path, 0.0), trained) is None


def test_rows_are_asked_for_where_there_are_none(trained: Path, tmp_path: Path) -> None:
    untrained = tmp_path / "checkpoint"
    with pytest.raises(UserError, match=r"calibration_rows .* was not fine-tuned"):
        quantize.calibration_rows(asked(tmp_path, 0.5), untrained)
    with pytest.raises(UserError, match=r"calibration_rows .* has no train\.data"):
        quantize.calibration_rows(asked(tmp_path, 0.5, train=None), trained)
    assert quantize.calibration_rows(asked(tmp_path, None), untrained) is None
    assert quantize.calibration_rows(asked(tmp_path, None, train=None), trained) is None
    plain = Request(load_profile(str(write_profile(tmp_path, quantization={}))), {})
    assert quantize.calibration_rows(plain, trained) is None
    assert RtnSettings().calibration is None
