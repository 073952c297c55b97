"""The journal: what was appended is there whatever was cut off, and only for the same order."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3_mlflow.core.errors import UserError
from phi3_mlflow.scoring.journal import Journal
from phi3_mlflow.scoring.requests import Result

HEADER = {"input_sha256": "aa", "model": "m", "max_tokens": None, "seed": 5}

results = st.builds(
    Result,
    response=st.none() | st.text(max_size=10),  # half characters too
    finish_reason=st.sampled_from([None, "stop", "length"]),
    prompt_tokens=st.none() | st.integers(0, 10**6),
    completion_tokens=st.none() | st.integers(0, 10**6),
    error=st.none() | st.text(max_size=10),
)


@settings(max_examples=60, deadline=None)
@given(
    found=st.lists(results, min_size=1, max_size=12),
    order=st.randoms(use_true_random=False),
    size=st.integers(1, 4),
    cut=st.floats(0, 1),
)
def test_what_is_left_of_a_torn_journal_is_right(
    found: list[Result],
    order: object,
    size: int,
    cut: float,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.mktemp("journal") / "j"
    indexes = list(range(len(found)))
    order.shuffle(indexes)
    batches = [indexes[at : at + size] for at in range(0, len(indexes), size)]
    ends = []
    with Journal(path, HEADER, len(found)) as journal:
        for batch in batches:
            journal.append([(index, found[index]) for index in batch])
            ends.append(path.stat().st_size)
        assert [journal.result(index) for index in range(len(found))] == found
    whole = path.read_bytes()
    kept = int(len(whole) * cut)
    path.write_bytes(whole[:kept])
    left = {i for batch, end in zip(batches, ends, strict=True) if end <= kept for i in batch}
    with Journal(path, HEADER, len(found)) as journal:
        assert journal.done == len(left)
        assert {index for index in indexes if index in journal} == left
        assert all(journal.result(index) == found[index] for index in left)
        missing = [index for index in indexes if index not in journal]
        journal.append([(index, found[index]) for index in missing])
        assert [journal.result(index) for index in range(len(found))] == found
    with Journal(path, HEADER, len(found)) as journal:
        assert journal.done == len(found)


def test_a_damaged_line_and_all_after_it_are_scored_again(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with Journal(path, HEADER, 3) as journal:
        for index in range(3):
            journal.append([(index, Result(f"answer {index}"))])
    path.write_bytes(path.read_bytes().replace(b"answer 1", b"answer 9"))
    with Journal(path, HEADER, 3) as journal:
        assert [index in journal for index in range(3)] == [True, False, False]
        assert b"answer 2" not in path.read_bytes()


def test_another_order_is_refused_with_what_differs_and_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with Journal(path, HEADER, 3) as journal:
        journal.append([(0, Result("a"))])
    before = path.read_bytes()
    with pytest.raises(UserError) as refused:
        Journal(path, {**HEADER, "model": "other", "max_tokens": 9}, 3)
    told = str(refused.value)
    assert "model: m before, other now" in told
    assert "max_tokens: None before, 9 now" in told
    assert "input_sha256" not in told
    assert "force=true" in told
    assert path.read_bytes() == before


def test_a_drawn_seed_is_taken_from_the_journal(tmp_path: Path) -> None:
    path = tmp_path / "j"
    Journal(path, HEADER, 3).__exit__(None, None, None)
    with Journal(path, {**HEADER, "seed": 99}, 3, adopt=("seed",)) as journal:
        assert journal.header["seed"] == 5
    with pytest.raises(UserError, match="seed: 5 before, 99 now"):
        Journal(path, {**HEADER, "seed": 99}, 3)


def test_two_processes_do_not_write_one_journal(tmp_path: Path) -> None:
    first = Journal(tmp_path / "j", HEADER, 3)
    with pytest.raises(UserError, match="another process writes the same output"):
        Journal(tmp_path / "j", HEADER, 3)
    first.__exit__(None, None, None)
    with Journal(tmp_path / "j", HEADER, 3) as second:
        assert second.header["seed"] == 5


@pytest.mark.parametrize("content", [b"my notes\n", b"my notes", b'{"a": 1}\n' * 9])
def test_a_file_that_is_no_journal_is_left_alone(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "j"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is not a journal of scoring"):
        Journal(path, HEADER, 3)
    assert path.read_bytes() == content
