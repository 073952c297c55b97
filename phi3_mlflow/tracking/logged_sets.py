"""Evaluation sets as inputs of a run: the same name and digest wherever the same rows were asked.

MLflow's own digests are of tables that it makes: they count what tells two runs apart (ids of
traces, say) and not what a model is asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import pandas
    from mlflow.data.pandas_dataset import PandasDataset
    from pydantic import BaseModel

DIGEST_LENGTH = 36
"""Characters that a digest may have in MLflow; the whole is a tag of the input."""


@dataclass(frozen=True)
class LoggedSet:
    """A set of rows.

    Attributes:
        name: what it is called.
        digest: of its content, as hex.
        rows: what it holds.
    """

    name: str
    digest: str
    rows: Sequence[BaseModel]

    def dataset(self) -> PandasDataset:
        """The set as MLflow takes it, a row of JSON for each of its rows."""
        import pandas
        from mlflow.data.code_dataset_source import CodeDatasetSource
        from mlflow.data.pandas_dataset import from_pandas

        rows = [{"row": row.model_dump_json(by_alias=True)} for row in self.rows]
        # The default source is the script that runs, by its path on this machine.
        return from_pandas(
            pandas.DataFrame(rows),
            source=CodeDatasetSource({"set": self.name}),
            name=self.name,
            digest=self.digest[:DIGEST_LENGTH],
        )


def log_sets(sets: Iterable[LoggedSet]) -> None:
    """Log sets as inputs of the active run; those without rows are left out."""
    import mlflow

    for each in sets:
        if each.rows:
            tags = {"rows": str(len(each.rows)), "sha256": each.digest}
            mlflow.log_input(each.dataset(), context="evaluation", tags=tags)


def name_rows(frame: pandas.DataFrame, rows_of: LoggedSet) -> None:
    """Tell `mlflow.genai.evaluate` which set a table was made from.

    It takes that from tables of its own data sets; from others it makes a name and a digest.
    """
    from mlflow.genai.datasets.evaluation_dataset import compute_records_sha256
    from mlflow.utils.mlflow_tags import MLFLOW_GENAI_EVALUATE_DATASET_IDENTITY

    shown = rows_of.dataset().to_dict()
    frame.attrs[MLFLOW_GENAI_EVALUATE_DATASET_IDENTITY] = {
        **{name: shown[name] for name in ("name", "digest", "source_type", "source")},
        "records_sha256": compute_records_sha256(frame),
    }
