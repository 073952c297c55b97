"""Full precision is asked for answers of its own where it fits, or where the profile says so."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from phi3_mlflow.artifacts.cache import StepCache
from phi3_mlflow.core import console
from phi3_mlflow.core.progress import no_progress
from phi3_mlflow.evaluation import evaluate
from phi3_mlflow.evaluation.evaluate import Checkpoint, Evaluator
from phi3_mlflow.evaluation.items import Question
from phi3_mlflow.evaluation.reference import answer_alone
from phi3_mlflow.evaluation.report.bought import bought
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
        evaluate,
        "answer_all",
        lambda folder, some, bar, store: [answer(int(q.id[1:])) for q in some],
    )
    monkeypatch.setattr(evaluate, "answer_alone", lambda *given: None)
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


def test_one_question_at_a_time_tells_speed_and_memory(checkpoint: Path) -> None:
    with no_progress("full precision", 2) as bar:
        found = answer_alone(checkpoint, QUESTIONS[:2], bar)
    assert found is not None
    answers, peak = found
    assert [a.question_id for a in answers] == ["q0", "q1"]
    assert all(a.seconds > 0 for a in answers)
    assert peak > 50e6, "of a process with transformers in it"


MINE = {
    "size_bytes": 90e6, "peak_memory_bytes": 300e6, "tokens_per_second": 80.0, "accuracy": 0.301,
    "top1_agreement": 0.882,
}  # fmt: skip


def test_what_int4_bought_in_a_sentence() -> None:
    full = {
        "size_bytes_full": 414e6, "peak_memory_bytes_full": 900e6, "tokens_per_second_full": 10.0,
        "accuracy_full": 0.31,
    }  # fmt: skip
    found = bought({**MINE, **full})
    assert found.sentence == (
        "Beside full precision this version is 4.6 times smaller on disk, 3.0 times smaller in "
        "memory and 8.0 times faster; it answers 30.1% of the questions right, full precision "
        "31.0%; on held-out text it would go on with the same word piece 88.2% of the time."
    )
    assert found.missing == ""
    assert [row.full for row in found.rows] == ["414 MB", "900 MB", "10 tokens/s", "31.0%"]


def test_what_was_not_measured_of_full_precision_is_said_and_not_made_up() -> None:
    found = bought({**MINE, "size_bytes_full": 92e6})
    assert found.sentence.startswith("Beside full precision this version is as large on disk; on")
    assert [row.full for row in found.rows] == ["92 MB", *["not measured"] * 3]
    assert "peak memory, speed, median and questions answered right" in found.missing
    assert "size full" in found.missing
    assert bought({}).sentence == ""
