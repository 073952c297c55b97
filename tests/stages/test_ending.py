"""What `main` says at its end, in the words of the store that is used."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi3_mlflow.config.loading import load_profile
from phi3_mlflow.config.parameters import Request
from phi3_mlflow.core import console
from phi3_mlflow.stages import ending
from phi3_mlflow.stages.records import EvaluatedVersion, EvaluationRecord, PromotionRecord
from phi3_mlflow.tracking import registry

REQUEST = Request(load_profile("smollm2-135m"), {"profile": "smollm2-135m"})
LONG = "word " * 400
REASON = "kl_mean is 9, 8.88 above the max 0.12"


def evaluated(gate: str, decision: str, *reasons: str) -> Any:
    found = EvaluatedVersion.model_validate(
        {
            "metrics": {"accuracy": 0.3, "kl_mean": 9.0},
            "verdict": {
                "gate": gate,
                "passed": not reasons,
                "decision": decision,
                "why": "; ".join(reasons) or "all thresholds are met",
                "against": None,
                "checks": (),
                "comparisons": (),
                "reasons": reasons,
            },
            "sample": {"question": "Who?", "answer": LONG},
        }
    )
    record = EvaluationRecord(
        run_id="abc", versions={"models:/m/3": found}, hardware="", texts_sha256=""
    )
    return SimpleNamespace(record=record, entry=SimpleNamespace(path=Path("/cache/evaluate")))


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(console, "say", lines.append)
    monkeypatch.setattr(registry, "alias_of", lambda name, alias: "3")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@tracking.example:5000")
    return lines


def test_the_end_has_verdict_reason_report_and_the_next_command(said: list[str]) -> None:
    promoted = PromotionRecord(champion="models:/m/3", before=None, moved=True, reason="it passed")
    ending.say_done(REQUEST, evaluated("passed", "promote"), promoted, worked=True)
    (text,) = said
    for words in (
        "Gate: passed, promote: all thresholds are met",
        "models:/m/3 is the champion now: it passed",
        "/cache/evaluate/3/report.html",
        "runs:/abc/evaluation/3/report.html",
        "open http://tracking.example:5000 in a browser",
        "MLFLOW_TRACKING_URI=http://tracking.example:5000",
        "-e serve --env-manager",
    ):
        assert words in text, words
    assert "--backend-store-uri" not in text, "a server has no such thing"
    assert "secret" not in text
    assert max(len(line) for line in text.splitlines() if "word" in line) < 300
    assert "Nothing to do" not in text


def test_a_refusal_has_figures_report_and_what_to_try(said: list[str]) -> None:
    ending.say_refused(REQUEST, evaluated("failed", "refuse", REASON))
    (text,) = said
    for words in (
        "Refused: models:/m/3",
        REASON,
        "KL divergence from full precision  9.000 nats",
        "/cache/evaluate/3/report.html",
        "algorithm=search",
        "-P version=3 -P size=full",
        "-e promote",
        "-P overrule=true",
    ):
        assert words in text, words
    assert "never end" not in text


def test_what_never_ends_has_another_way_out(said: list[str]) -> None:
    ending.say_refused(REQUEST, evaluated("failed", "refuse", "endless_rate is 1, 0.2 above 0.8"))
    assert "generation_config.json" in said[0]
    assert "algorithm=search" not in said[0]


def test_a_database_is_looked_at_with_mlflow_ui(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////data/my runs/mlflow.db")
    look, serve, *_ = ending.next_commands(REQUEST)
    assert look.endswith("ui --backend-store-uri 'sqlite:////data/my runs/mlflow.db'")
    assert "MLFLOW_TRACKING_URI='sqlite:////data/my runs/mlflow.db' " in serve


@given(st.text())
def test_an_answer_is_one_line_of_bounded_length(answer: str) -> None:
    short = ending.shortened(answer)
    assert len(short.splitlines()) <= 1
    assert len(short) <= 250
    if len(answer) < 200:
        assert short.split() == answer.split()


def test_the_steps_outcome_is_found_by_its_step() -> None:
    from phi3_mlflow.pipeline.runner import Pipeline

    one, other = SimpleNamespace(name="a"), SimpleNamespace(name="b")
    pipeline = cast("Any", SimpleNamespace(outcomes=[SimpleNamespace(step=one)]))
    assert Pipeline.outcome(pipeline, cast("Any", one)).step is one
    with pytest.raises(LookupError, match="b was not done"):
        Pipeline.outcome(pipeline, cast("Any", other))
