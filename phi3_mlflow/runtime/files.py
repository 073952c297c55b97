"""Are the files of a logged model there, and as large as when they were logged?

Asked whenever it is loaded, by whatever means: a runtime's own message about a file that is gone or
cut off names neither. The bytes are compared by the project's own commands, which read them anyway.
"""

from __future__ import annotations

import json
from pathlib import Path

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR

HERE = Path(__file__).parent.parent
"""The logged model's folder; in the project a folder without a manifest."""


def require_files(folder: Path = HERE) -> None:
    """Compare the names and sizes of a model's files with its manifest, where it has one.

    Raises:
        MlflowException: naming each file that differs.
    """
    try:
        listed = json.loads((folder / "manifest.json").read_text("utf-8"))["files"]
        sizes = {str(entry["path"]): int(entry["size"]) for entry in listed}
    except (OSError, ValueError, KeyError, TypeError):
        return
    problems = []
    for path, size in sizes.items():
        try:
            found = (folder / path).stat().st_size
        except OSError:
            problems.append(f"{path} is missing")
            continue
        if found != size:
            problems.append(f"{path} has {found} bytes, {size} were logged")
    if problems:
        raise MlflowException(
            f"the model in {folder} is damaged: {'; '.join(problems)}. Log it again, or bring the "
            "files back from a copy",
            error_code=INTERNAL_ERROR,
        )
