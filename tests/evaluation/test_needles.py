"""Long prompts are as long as their recipes say, and hold their needle where it belongs."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3_mlflow.core.errors import UserError
from phi3_mlflow.evaluation import checks, needles
from phi3_mlflow.evaluation import datasets as ds
from phi3_mlflow.evaluation.items import Needle

NEEDLES = ds.load_needles()


def words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize("row", NEEDLES, ids=lambda row: row.id)
def test_needle_prompts(row: Needle) -> None:
    messages = needles.build_needle_prompt(row, lambda text: (len(text) + 3) // 4)
    assert messages == needles.build_needle_prompt(row, lambda text: (len(text) + 3) // 4)
    (message,) = messages
    text = message["content"]
    assert 0.97 * row.target_tokens <= (len(text) + 3) // 4 <= row.target_tokens
    assert abs(text.index(row.needle) / len(text) - row.depth) < 0.12
    assert checks.check_answer(row.check, row.needle)
    assert not checks.check_answer(
        row.check, text.replace(row.needle, "")[: checks.MAX_ANSWER_CHARS]
    )


@given(st.integers(100, 2000), st.floats(0, 1))
@settings(deadline=None, max_examples=30)
def test_needle_prompt_fits_any_target(target: int, depth: float) -> None:
    row = NEEDLES[0].model_copy(update={"target_tokens": target, "depth": depth})
    (message,) = needles.build_needle_prompt(row, words)
    assert 0.9 * target <= words(message["content"]) <= target
    assert row.needle in message["content"]


def test_needle_prompt_refuses_what_cannot_be_built() -> None:
    with pytest.raises(UserError, match="haystack holds"):
        needles.build_needle_prompt(NEEDLES[0], words, ["too short"])
    with pytest.raises(UserError, match="no room"):
        needles.build_needle_prompt(NEEDLES[0].model_copy(update={"target_tokens": 100}), len)
