"""The bound on failed rows of a scored file."""

from __future__ import annotations

import pytest

from phi3_mlflow.config.parameters import read_request
from phi3_mlflow.core.errors import EXIT_GATE, TooManyFailed, UserError
from phi3_mlflow.stages import score
from phi3_mlflow.stages.score import max_failed


def bound(text: str) -> int | None:
    """Rows that may fail of 50."""
    found = max_failed(read_request(score.COMMAND.parameters, {"max_failed": text}))
    return None if found is None else found.of(50)


@pytest.mark.parametrize(
    ("text", "rows"),
    [("auto", None), ("0", 0), ("7", 7), ("0%", 0), ("5%", 2), ("12.5%", 6), ("100%", 50)],
)
def test_a_number_or_a_part(text: str, rows: int | None) -> None:
    assert bound(text) == rows


@pytest.mark.parametrize("text", ["-1", "5 %", "101%", "none", "0.05", "1e3"])
def test_anything_else_is_refused_before_any_work(text: str) -> None:
    with pytest.raises(UserError, match="max_failed"):
        bound(text)


def test_it_has_the_exit_code_of_a_gate() -> None:
    assert TooManyFailed("x").exit_code == EXIT_GATE
