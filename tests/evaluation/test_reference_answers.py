"""Full precision is asked for answers of its own where it fits, or where the profile says so."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from phi3_mlflow.artifacts.cache import StepCache
from phi3_mlflow.core import console
from phi3_mlflow.evaluation import evaluate
from phi3_mlflow.evaluation.evaluate import Checkpoint, Evaluator
from phi3_mlflow.evaluation.items import Question
from phi3_mlflow.evaluation.sets import Sets
from phi3_mlflow.evaluation.settings import EvaluationSettings, GateSettings
from tests.evaluation.measurements import answer
from tests.fixtures.tiny_phi3 import make_tiny

QUESTIONS = [
    Question.model_validate(
        {
            "id": f"q{number}",
            "category": "facts",
            "messages": [{"role": "user", "content": "?"}],
            "check": {"kind": "exact", "value": "yes"},
        }
    )
    for number in range(3)
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("size", "wanted", "free", "asked"),
    [
        ("full", "auto", 10**9, True),
        ("full", "auto", None, True),
        ("full", "auto", 4 * 10**5, False),
        ("full", "always", 4 * 10**5, True),
        ("full", "never", 10**9, False),
        ("quick", "always", 10**9, False),
    ],
)
def test_when_it_is_asked(
    size: str, wanted: str, free: int | None, asked: bool, checkpoint: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    shown = [SimpleNamespace(id="q1")]
    monkeypatch.setattr(evaluate, "worst_answers", lambda *given: shown)
    monkeypatch.setattr(
        evaluate, "answer_all", lambda folder, some, bar: [answer(int(q.id[1:])) for q in some]
    )
    monkeypatch.setattr(evaluate, "available_memory", lambda: free)
    console.set_quiet(False)
    settings = EvaluationSettings.model_validate({"size": size, "reference_answers": wanted})
    evaluator = Evaluator(
        facts=cast("Any", None),
        settings=settings,
        gate=GateSettings(),
        reference=Checkpoint(checkpoint, ""),
        base=None,
        sets=Sets(QUESTIONS, []),
        store=StepCache(tmp_path),
    )
    said = evaluator._reference_answers(cast("Any", None))
    assert said == ({"q1": "yes"} if asked else {})
    noted = "0.0 GB are free" in capsys.readouterr().err
    assert noted == (size == "full" and wanted == "auto" and not asked)
