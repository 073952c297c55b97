"""Hidden states are the same whether they lie in memory or in a file."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from phi3_mlflow.layers.states import States


@pytest.fixture(params=["memory", "file"])
def filled(request: pytest.FixtureRequest, tmp_path: Path) -> States:
    most = 10**6 if request.param == "memory" else 0
    made = States(10, 3, folder=tmp_path, most=most)
    for start, stop in made.parts(4):
        made.write(start, torch.arange(start * 3, stop * 3, dtype=torch.float32).reshape(-1, 3))
    return made


def test_what_was_written_is_read(filled: States, tmp_path: Path) -> None:
    assert torch.equal(filled.read(2, 5), torch.arange(6.0, 15.0).reshape(3, 3))
    rows = filled.read(9, 10)
    rows += 1
    filled.write(9, rows)
    assert filled.read(9, 10).tolist() == [[28, 29, 30]]
    assert not list(tmp_path.iterdir()), "the file has no name"


def test_saved_and_loaded(filled: States, tmp_path: Path) -> None:
    file = tmp_path / "states"
    with file.open("wb") as stream:
        filled.save(stream, part=3)
    kept = States.stored(file, 3)
    assert kept.places == 10
    assert torch.equal(kept.read(0, 10), filled.read(0, 10))
    for most in (0, 10**6):
        other = States(10, 3, most=most)
        with file.open("rb") as stream:
            other.load(stream, part=4)
        assert torch.equal(other.read(0, 10), filled.read(0, 10))
    assert torch.equal(filled.copy(most=0).read(0, 10), filled.read(0, 10))


def test_a_file_that_is_too_short_is_noticed(filled: States) -> None:
    with pytest.raises(EOFError):
        filled.load(io.BytesIO(b"\0" * 50))
