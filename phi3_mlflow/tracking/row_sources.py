"""Rows that MLflow keeps: files among its artifacts, and its data sets.

    local_rows("runs:/RUN_ID/tickets.jsonl")     whatever MLflow downloads from, s3:// as well
    local_rows("mlflow-dataset:tickets")         a data set of mlflow.genai.datasets, by name or id

A record of a data set becomes a row: its answer is `expectations.expected_response`, what is asked
`inputs.messages`, or the one text that `inputs` holds; `expectations.check` is the row's check. The
rows are put in the order of their content, so that equal records are equal files.
"""

from __future__ import annotations

import atexit
import json
import re
import shutil
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_mlflow.core.errors import UserError
from phi3_mlflow.rows.faults import NOTHING, FaultList
from phi3_mlflow.rows.location import DATASET, is_uri, local_path
from phi3_mlflow.tracking.connection import connect

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mlflow.data.dataset_source import DatasetSource

_DATASET_ID = re.compile(r"d-[0-9a-f]{32}")
_LISTED = 20


def local_rows(source: str | Path) -> Path:
    """The file of rows that a path or a URI names; what MLflow keeps is fetched first.

    Raises:
        UserError: there is no such thing, or a record of a data set is no row.
    """
    text = str(source)
    if text.startswith(DATASET):
        connect()
        return _written(text.removeprefix(DATASET))
    if text.startswith(("runs:", "models:", "mlflow-artifacts:")):
        connect()
    return local_path(source)


def source_of(shown: str, file: Path) -> DatasetSource:
    """What MLflow shows as the source of a run's rows.

    Args:
        shown: what the user named, a path or a URI.
        file: the local file of it.
    """
    from mlflow.data.code_dataset_source import CodeDatasetSource
    from mlflow.data.dataset_source_registry import resolve_dataset_source
    from mlflow.data.evaluation_dataset_source import EvaluationDatasetSource
    from mlflow.exceptions import MlflowException

    if shown.startswith(DATASET):
        return EvaluationDatasetSource(_found(shown.removeprefix(DATASET)).dataset_id)
    try:
        with warnings.catch_warnings():
            # It has two resolvers for a file, of the same kind, and says so.
            warnings.filterwarnings("ignore", message="The specified dataset source can be")
            return resolve_dataset_source(shown if is_uri(shown) else file.absolute().as_uri())
    except MlflowException:  # it knows stores, but not its own short names for what is in them
        return CodeDatasetSource({"uri": shown})


def _found(name: str) -> Any:
    from mlflow.exceptions import MlflowException
    from mlflow.genai.datasets import get_dataset

    named = {"dataset_id": name} if _DATASET_ID.fullmatch(name) else {"name": name}
    try:
        return get_dataset(**named)
    except (MlflowException, ImportError, ValueError) as error:
        raise UserError(
            f"{DATASET}{name}: MLflow has no such data set here: {error}\n"
            "Give the name or the id of one of mlflow.genai.datasets, or a file."
        ) from error


@lru_cache
def _written(name: str) -> Path:
    """The records of a data set as JSONL; one file per process, removed when it ends."""
    records = _found(name).to_df().to_dict("records")
    faults = FaultList()
    lines = []
    for record in records:
        if row := _row(record, faults):
            lines.append(json.dumps(row, sort_keys=True))
    faults.refuse(f"{DATASET}{name}", _LISTED)
    folder = Path(tempfile.mkdtemp(prefix="phi3-mlflow-set-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    file = folder / f"{re.sub(r'[^A-Za-z0-9._-]', '-', name)}.jsonl"
    file.write_text("".join(line + "\n" for line in sorted(lines)), "utf-8")
    return file


def _row(record: Mapping[str, Any], faults: FaultList) -> dict[str, Any] | None:
    where = f"record {record['dataset_record_id']}"
    inputs, expected = record["inputs"] or {}, record["expectations"] or {}
    answer = expected.get("expected_response")
    texts = [value for value in inputs.values() if isinstance(value, str)]
    before = len(faults)
    if not isinstance(answer, str):
        found = NOTHING if answer is None else answer
        faults.add(where, "expectations.expected_response", found, "should be the answer, a text")
    if isinstance(inputs.get("messages"), list):
        asked = inputs["messages"]
    else:
        asked = [{"role": "user", "content": text} for text in texts]
        if len(texts) != 1 or len(inputs) != 1:
            told = "should be messages, or one text"
            faults.add(where, "inputs", sorted(inputs), told)
    if len(faults) > before:
        return None
    row = {"messages": [*asked, {"role": "assistant", "content": answer}]}
    return row | ({"check": expected["check"]} if "check" in expected else {})
