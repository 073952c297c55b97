"""Rows out of MLflow: its artifacts and its data sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import pytest

from phi3_mlflow.core.errors import UserError
from phi3_mlflow.tracking import row_sources
from phi3_mlflow.tracking.row_sources import local_rows, source_of

if TYPE_CHECKING:
    from tests.conftest import Workspace

EXACT = {"kind": "exact", "value": "4"}


@pytest.fixture(autouse=True)
def _here(workspace: Workspace) -> None:
    row_sources._written.cache_clear()
    mlflow.set_tracking_uri(workspace.tracking_uri)


def dataset(name: str, *records: dict[str, Any]) -> Any:
    made = mlflow.genai.datasets.create_dataset(name=name)
    made.merge_records(list(records))
    return made


def record(asked: dict[str, Any], **expected: Any) -> dict[str, Any]:
    return {"inputs": asked, "expectations": expected}


def test_records_become_rows_in_the_order_of_their_content(workspace: Workspace) -> None:
    said = [{"role": "system", "content": "Count."}, {"role": "user", "content": "2 + 2?"}]
    records = (
        record({"question": "Who?"}, expected_response="You."),
        record({"messages": said}, expected_response="4", check=EXACT),
        record({"question": "What?"}, expected_response="That."),
    )
    made = dataset("one", *records)
    dataset("two", *records[::-1])
    file = local_rows("mlflow-dataset:one")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {row["messages"][-1]["content"] for row in rows} == {"You.", "4", "That."}
    (checked,) = [row for row in rows if "check" in row]
    assert checked == {
        "messages": [*said, {"role": "assistant", "content": "4"}],
        "check": EXACT,
    }
    assert local_rows("mlflow-dataset:two").read_bytes() == file.read_bytes()
    assert local_rows(f"mlflow-dataset:{made.dataset_id}").read_bytes() == file.read_bytes()
    source = source_of("mlflow-dataset:one", file)
    assert source.to_dict() == {"dataset_id": made.dataset_id}


def test_records_that_are_no_rows_are_told_all_at_once(workspace: Workspace) -> None:
    dataset(
        "bad",
        record({"question": "Who?"}, expected_facts=["x"]),
        record({"a": "x", "b": "y"}, expected_response="z"),
        record({"question": "Why?"}, expected_response="z"),
    )
    with pytest.raises(UserError) as told:
        local_rows("mlflow-dataset:bad")
    text = str(told.value)
    assert text.startswith("mlflow-dataset:bad: 2 problems:")
    assert "expectations.expected_response: should be the answer, a text" in text
    assert "inputs: found ['a', 'b']; should be messages, or one text" in text


def test_what_is_not_there_is_told(workspace: Workspace) -> None:
    with pytest.raises(UserError, match="mlflow-dataset:none: MLflow has no such data set here"):
        local_rows("mlflow-dataset:none")
    with pytest.raises(UserError, match="cannot be downloaded"):
        local_rows("runs:/0123456789abcdef0123456789abcdef/rows.jsonl")


def test_a_file_among_the_artifacts_of_a_run(workspace: Workspace, tmp_path: Path) -> None:
    experiment = mlflow.create_experiment("rows", artifact_location=(tmp_path / "a").as_uri())
    with mlflow.start_run(experiment_id=experiment) as run:
        mlflow.log_text('{"prompt": "x", "completion": "y"}\n', "data/rows.jsonl")
    uri = f"runs:/{run.info.run_id}/data/rows.jsonl"
    file = local_rows(uri)
    assert file.name == "rows.jsonl"
    assert source_of(uri, file).to_dict() == {"tags": {"uri": uri}}
    plain = source_of(str(file), file)
    assert plain.to_dict() == {"uri": file.as_uri()}
    assert local_rows(file) == file
