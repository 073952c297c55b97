"""Damaged models of the embedded default, each refused by its own profile for the right reason."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import NodeProto

from phi3_mlflow.config.loading import load_profile
from phi3_mlflow.evaluation import datasets
from phi3_mlflow.evaluation.gate import check_thresholds
from phi3_mlflow.evaluation.measure import diverge, measure
from phi3_mlflow.evaluation.sets import Sets
from phi3_mlflow.flavors.onnx import log_onnx
from tests.conftest import Workspace

pytestmark = pytest.mark.slow

THRESHOLDS = load_profile("smollm2-135m").gate.thresholds
OF_TEXTS = {name: bound for name, bound in THRESHOLDS.items() if name != "accuracy"}
TEXTS = datasets.load_heldout(quick=True)[:2]


Edit = Callable[[np.ndarray], None]


def damaged(onnx_dir: Path, copy: Path, edits: Callable[[NodeProto], dict[int, Edit]]) -> Path:
    """A copy of an ONNX model with some inputs of its quantized matrices changed in place.

    Args:
        edits: for a MatMulNBits node (A, B, scales, zero points), what to do with which input.
    """
    import onnx

    shutil.copytree(onnx_dir, copy)
    graph = onnx.load(copy / "model.onnx", load_external_data=False).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    data = np.memmap(copy / "model.onnx.data", dtype=np.uint8, mode="r+")
    done = set()
    for node in graph.node:
        for place, edit in edits(node).items() if node.op_type == "MatMulNBits" else ():
            name = node.input[place]
            where = {entry.key: entry.value for entry in tensors[name].external_data}
            start = int(where["offset"])
            if name not in done:
                edit(data[start : start + int(where["length"])])
            done.add(name)
    assert done, "nothing was damaged"
    data.flush()
    return copy


def shifted_zero_points(node: NodeProto) -> dict[int, Edit]:
    """Both zero points in each byte one lower, as when a checkpoint's format is mistaken.

    A symmetric matrix has none written down; there, as much is done to the weights.
    """
    if next(a.i for a in node.attribute if a.name == "bits") != 4:
        return {}
    written = len(node.input) > 3 and bool(node.input[3])
    step = -1 if written else 1

    def shift(packed: np.ndarray) -> None:
        low = ((packed & 15).astype(np.int8) + step).clip(0, 15).astype(np.uint8)
        high = ((packed >> 4).astype(np.int8) + step).clip(0, 15).astype(np.uint8)
        packed[:] = low | (high << 4)

    return {3 if written else 1: shift}


def empty_head(node: NodeProto) -> dict[int, Edit]:
    """The scales of the head are nothing, so every token is as likely as any other."""

    def nothing(scales: np.ndarray) -> None:
        scales[:] = 0

    return {2: nothing} if "lm_head" in node.name else {}


@pytest.fixture(scope="module")
def sound(real_checkpoint: Path, real_onnx: Path) -> dict[str, float]:
    """The figures of the model as it was built."""
    return diverge(real_checkpoint, real_onnx, TEXTS, 512).metrics()


@pytest.mark.parametrize("edits", [shifted_zero_points, empty_head])
def test_damaged_weights_are_refused_for_their_divergence(
    edits: Callable[[NodeProto], dict[int, Edit]],
    sound: dict[str, float],
    real_checkpoint: Path,
    real_onnx: Path,
    tmp_path: Path,
) -> None:
    model = damaged(real_onnx, tmp_path / "model", edits)
    metrics = diverge(real_checkpoint, model, TEXTS, 512).metrics()
    verdict = check_thresholds(metrics, OF_TEXTS)
    assert metrics["kl_mean"] > 3 * sound["kl_mean"]
    assert verdict.decision == "refuse"
    assert "above the max" in next(r for r in verdict.reasons if r.startswith("kl_mean"))
    assert any(reason.startswith("perplexity_ratio") for reason in verdict.reasons)


def test_a_wrong_chat_template_is_refused_for_its_answers(
    workspace: Workspace, sound: dict[str, float], real_checkpoint: Path, real_onnx: Path
) -> None:
    """The weights are sound, so the texts show nothing; what it says to people does."""
    import mlflow

    model = shutil.copytree(real_onnx, workspace.folder / "model")
    template = model / "chat_template.jinja"
    assert template.is_file()
    template.write_text("{% for m in messages %}[INST] {{ m['role'] }} {% endfor %}")
    mlflow.set_tracking_uri(workspace.tracking_uri)
    mlflow.set_experiment("damaged")  # the one that was chosen last belongs to another store
    info = log_onnx(model, name="wrong-template")
    questions = [q for q in datasets.load_questions(quick=True) if q.max_tokens <= 48][:16]
    sets = Sets(questions, TEXTS)
    found = measure(info.model_uri, reference=real_checkpoint, sets=sets, window=512)
    verdict = check_thresholds(found.metrics, THRESHOLDS)
    assert verdict.decision == "refuse"
    assert any(reason.startswith("accuracy is") for reason in verdict.reasons), verdict.reasons
    assert found.metrics["kl_mean"] == pytest.approx(sound["kl_mean"], rel=1e-3)
