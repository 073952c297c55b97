"""Full precision is compared with as transformers computes it, and computed once."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from phi3_mlflow.artifacts.cache import StepCache
from phi3_mlflow.core import console
from phi3_mlflow.core.errors import UserError
from phi3_mlflow.evaluation import streamed as module
from phi3_mlflow.evaluation.divergence import compare, cut, tokenize
from phi3_mlflow.evaluation.items import HeldoutText
from phi3_mlflow.evaluation.logits import OnnxLogits
from phi3_mlflow.evaluation.measure import diverge
from phi3_mlflow.evaluation.streamed import STEP, streamed
from phi3_mlflow.genai.export import export_onnx
from phi3_mlflow.layers import forward, kept, states
from phi3_mlflow.runtime.genai_config import GenaiConfig
from tests.fixtures.tiny_phi3 import make_tiny

TEXTS = [
    HeldoutText(id=f"t{n}", text="Once upon a time there was a text. " * n) for n in (1, 3, 2, 5)
]


class Whole:
    """A checkpoint in transformers, in float32."""

    def __init__(self, directory: Path) -> None:
        from transformers import Phi3ForCausalLM

        self._model: Any = Phi3ForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    def logits(self, pieces: list[np.ndarray]) -> list[np.ndarray]:
        with torch.inference_mode():
            ids = [torch.from_numpy(piece).long()[None] for piece in pieces]
            return [self._model(some, use_cache=False).logits[0].numpy() for some in ids]


@pytest.fixture(scope="module", params=["phi-3.5-mini", "phi-4-mini"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(scope="module")
def onnx(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A candidate that differs from it: another checkpoint's export."""
    other = make_tiny(tmp_path_factory.mktemp("other"), seed=1, sliding_window=None)
    folder = tmp_path_factory.mktemp("onnx") / "onnx"
    export_onnx(other, folder, precision="fp32")
    return folder


def test_the_figures_are_those_of_transformers(checkpoint: Path, onnx: Path) -> None:
    tokens = tokenize(checkpoint, ((text.id, text.text) for text in TEXTS))
    expected = compare(Whole(checkpoint), OnnxLogits(onnx), tokens, 48).metrics()
    assert expected["kl_mean"] > 0.1
    assert diverge(checkpoint, onnx, TEXTS, 48).metrics() == pytest.approx(expected, rel=1e-5)


def test_a_large_model_scores_some_texts_at_a_time(
    onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = [np.arange(3, 3 + length, dtype=np.int32) for length in (7, 8, 9, 9, 12)]
    whole = OnnxLogits(onnx).logits(pieces)
    place = 4 * GenaiConfig.read(onnx).decoder.token_values
    monkeypatch.setattr("phi3_mlflow.evaluation.logits._MOST_CACHE", 26 * place)
    source, asked = OnnxLogits(onnx), []
    prefill = source._prefill
    monkeypatch.setattr(source, "_prefill", lambda part: asked.append(len(part)) or prefill(part))
    for found, expected in zip(source.logits(pieces), whole, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert asked == [2, 2, 1]


def test_a_checkpoint_does_not_differ_from_itself(checkpoint: Path, tmp_path: Path) -> None:
    store = StepCache(tmp_path)
    metrics = diverge(checkpoint, checkpoint, TEXTS, 48, store=store).metrics()
    assert metrics["kl_mean"] == 0
    assert metrics["top1_agreement"] == 1
    assert len(store.entries()) == 1, "and is computed once"


def test_it_is_computed_once_and_again_when_anything_counts(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, runs = StepCache(tmp_path), []
    run = module._run
    monkeypatch.setattr(module, "_run", lambda *given: runs.append(1) or run(*given))
    pieces = [np.arange(3, 30, dtype=np.int32), np.arange(40, 45, dtype=np.int32)]

    def logits(some: list[np.ndarray], of: Path = checkpoint) -> list[np.ndarray]:
        with streamed(of, some, store) as source:
            return source.logits(some[::-1])[::-1]

    first = logits(pieces)
    assert [part.shape for part in first] == [(27, 320), (5, 320)]
    for one, other in zip(first, logits(pieces), strict=True):
        np.testing.assert_array_equal(one, other)
    assert len(runs) == 1
    logits(pieces[:1])
    logits([pieces[0][:26], np.concatenate([pieces[0][26:], pieces[1]])])
    assert len(runs) == 3, "the same tokens, cut at another place"
    logits(pieces, make_tiny(tmp_path / "other", seed=5))
    assert len(runs) == 4
    monkeypatch.setattr(module, "arithmetic", lambda reader: torch.bfloat16)
    logits(pieces)
    assert len(runs) == 5
    monkeypatch.setattr(
        "phi3_mlflow.artifacts.code_keys.Closure.hashes", lambda closure: {"a.py": "other"}
    )
    logits(pieces)
    assert len(runs) == 6


def test_what_is_kept_and_damaged_is_computed_again(checkpoint: Path, tmp_path: Path) -> None:
    store, pieces = StepCache(tmp_path), [np.arange(3, 30, dtype=np.int32)]
    with streamed(checkpoint, pieces, store) as source:
        (first,) = source.logits(pieces)
        (entry,) = store.entries()
        assert not store.remove(entry), "it is in use"
    assert entry.step == STEP
    with (entry.path / "states.f32").open("r+b") as stream:
        stream.write(b"\0" * 64)
    with streamed(checkpoint, pieces, store) as source:
        np.testing.assert_array_equal(source.logits(pieces)[0], first)


class Killed(BaseException):
    """What a test ends a run with."""


PIECES = [np.arange(3, 30, dtype=np.int32), np.arange(40, 45, dtype=np.int32)]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("deep"), num_hidden_layers=5)


def killed_in(layer: int, patch: pytest.MonkeyPatch) -> list[int]:
    """The next run is killed in this layer; the list says which ones it has begun."""
    begun: list[int] = []
    attention = forward._attention

    def until(here: Any, *more: Any) -> None:
        begun.append(int(next(iter(here._names.values())).split(".")[2]))
        if begun[-1] == layer:
            raise Killed
        attention(here, *more)

    patch.setattr(forward, "_attention", until)
    return begun


def states_of(checkpoint: Path, store: StepCache) -> bytes:
    with streamed(checkpoint, PIECES, store):
        (entry,) = store.entries()
        return (entry.path / "states.f32").read_bytes()


@pytest.mark.parametrize("most", [2**29, 0])
def test_a_killed_run_goes_on_after_its_last_layer_to_the_same_bytes(
    most: int, deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    expected = states_of(deep, StepCache(tmp_path / "undisturbed"))
    monkeypatch.setattr(kept, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(states.States.__init__, "__kwdefaults__", {"folder": None, "most": most})
    store = StepCache(tmp_path / "killed")
    for layer, first in ((0, 0), (2, 0), (3, 2), (3, 3)):
        with monkeypatch.context() as patch:
            begun = killed_in(layer, patch)
            with pytest.raises(Killed):
                states_of(deep, store)
        assert begun == list(range(first, layer + 1))
    (left,) = store.downloads.glob("*/*")
    assert left.name.startswith("states-3-")
    console.set_quiet(False)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        begun = killed_in(99, patch)
        assert states_of(deep, store) == expected
    assert begun == [3, 4]
    assert "full precision, from layer 3 on: 100 %" in capsys.readouterr().err
    assert not list(store.downloads.iterdir()), "nothing is kept of what is done"


@pytest.mark.parametrize("harm", ["shorter", "other", "unnamed"])
def test_what_was_kept_and_is_not_whole_is_not_gone_on_with(
    harm: str, deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = states_of(deep, StepCache(tmp_path / "undisturbed"))
    monkeypatch.setattr(kept, "SAVE_EVERY_S", 0.0)
    store = StepCache(tmp_path / "killed")
    with monkeypatch.context() as patch:
        killed_in(3, patch)
        with pytest.raises(Killed):
            states_of(deep, store)
    (left,) = store.downloads.glob("*/*")
    if harm == "unnamed":
        left.rename(left.with_name("begun.f32"))
    else:
        content = left.read_bytes()
        left.write_bytes(content[:-4] if harm == "shorter" else bytes(4) + content[4:])
    with monkeypatch.context() as patch:
        begun = killed_in(99, patch)
        assert states_of(deep, store) == expected
    assert begun == [0, 1, 2, 3, 4]


def test_no_room_for_what_is_kept_is_no_reason_to_end(
    deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "SAVE_EVERY_S", 0.0)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = tmp_path / "kept"
    folder.mkdir()
    some = kept.KeptStates(folder, 3, 2)
    matrix = states.States(2, 3)
    matrix.write(0, torch.ones(2, 3))
    with monkeypatch.context() as patch:
        patch.setattr(kept.os, "fsync", full)
        some.save(1, matrix)
    assert not list(folder.iterdir())
    some.save(0, matrix)
    assert not list(folder.iterdir()), "no layer is done yet"
    some.save(2, matrix)
    found = some.find()
    assert found is not None
    assert (found[0], found[1].read(0, 2).tolist()) == (2, [[1.0] * 3] * 2)


def test_texts_that_are_too_short_are_refused(checkpoint: Path) -> None:
    with pytest.raises(UserError, match="too short"):
        diverge(checkpoint, checkpoint, [HeldoutText(id="t", text="a")], 48)


def test_pieces_keep_the_name_of_their_text() -> None:
    found = [(name, ids.tolist()) for name, ids in cut([("a", [1, 2, 3]), ("b", [4, 5])], 2)]
    assert found == [("a", [1, 2]), ("b", [4, 5])]


@pytest.mark.slow
def test_the_defaults_figures_are_those_of_transformers(
    real_checkpoint: Path, real_onnx: Path
) -> None:
    from phi3_mlflow.evaluation import datasets

    texts = datasets.load_heldout(quick=True)[:3]
    tokens = tokenize(real_checkpoint, ((text.id, text.text) for text in texts))
    expected = compare(Whole(real_checkpoint), OnnxLogits(real_onnx), tokens, 512).metrics()
    found = diverge(real_checkpoint, real_onnx, texts, 512).metrics()
    assert found == pytest.approx(expected, rel=1e-5)
