"""The models-from-code file of the plain contract, a text in and a text out.

MLflow runs it to get at the model. It is copied into the logged model, with the folder `runtime`
next to it. MLflow's own way to bring modules along, `code_paths`, puts them on `sys.path` under
their plain names, so a process that loads two versions of a model (a champion and its challenger)
would run the code of the first for both. Here each load gets modules of its own.
"""

import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from mlflow.models import set_model

here = Path(__file__).parent
beside = here / "runtime"  # in a logged model; in the project it is one folder up
folder = beside if beside.is_dir() else here.parent / "runtime"
name = f"{__name__}_runtime"  # MLflow runs this file under a name that is new each time
spec = spec_from_file_location(name, folder / "__init__.py")
assert spec is not None
sys.modules[name] = module_from_spec(spec)
set_model(import_module(f"{name}.python_model").ChatPythonModel("prompt"))
