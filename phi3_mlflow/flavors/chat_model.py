"""The models-from-code file of the chat contract: MLflow runs it to get at the model.

It is copied into the logged model together with the folder `runtime`, which lies next to it there.
MLflow's own way to bring modules along, `code_paths`, puts them on `sys.path` under their plain
names, so a process that loads two versions of a model (a champion and its challenger) would run the
code of the first for both. Here each load gets modules of its own.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from mlflow.models import set_model


def _runtime() -> ModuleType:
    here = Path(__file__).parent
    beside = here / "runtime"  # in a logged model; in the project it is one folder up
    folder = beside if beside.is_dir() else here.parent / "runtime"
    name = f"{__name__}_runtime"  # MLflow runs this file under a name that is new each time
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"the logged model is incomplete: {folder} is missing")
    package = importlib.util.module_from_spec(spec)
    sys.modules[name] = package
    spec.loader.exec_module(package)
    return importlib.import_module(f"{name}.python_model")


set_model(_runtime().ChatPythonModel("chat"))
