"""Finding what a step takes: what the step before left, or what the user named."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from phi3_mlflow.artifacts.inputs import Folder, Input
from phi3_mlflow.artifacts.manifests import MANIFEST_NAME, Manifest
from phi3_mlflow.core.errors import UserError
from phi3_mlflow.core.hints import run_command
from phi3_mlflow.pipeline.step import slot
from phi3_mlflow.tracking.row_sources import local_rows
from phi3_mlflow.training.row_files import is_pattern, row_files

if TYPE_CHECKING:
    from phi3_mlflow.artifacts.cache import Entry, StepCache
    from phi3_mlflow.config.parameters import Request

CHECKPOINT = "a Hugging Face checkpoint"
ONNX = "an ONNX model that onnxruntime-genai opens"


def folder_input(
    request: Request, cache: StepCache, name: str, made_by: str, expected: str
) -> Folder:
    """The folder that was handed over, that a parameter names, or that the step before left.

    Args:
        request: says what was handed over or named, and for which profile.
        cache: where the outputs of earlier steps are.
        name: the parameter.
        made_by: the step that makes such a folder.
        expected: what it has to be, for the message.

    Raises:
        UserError: there is none.
    """
    handed = request.handed(name, Path)
    if handed is not None:
        return directory_input(cache, name, handed, expected)
    if request.is_auto(name):
        return entry_input(preceding_output(request, cache, name, made_by))
    return directory_input(cache, name, Path(request.value(name)).expanduser(), expected)


def full_precision(request: Request, cache: StepCache, expected: str = CHECKPOINT) -> Folder:
    """The float checkpoint: fine-tuned, where the profile has rows to train on; else as fetched.

    Raises:
        UserError: there is none.
    """
    made_by = "fetch" if request.profile.train is None else "train"
    return folder_input(request, cache, "checkpoint", made_by, expected)


def directory_input(cache: StepCache, name: str, path: Path, expected: str) -> Folder:
    """A folder that was named.

    Raises:
        UserError: it is not a folder, or its content differs from its own manifest.
    """
    if entry := cache.holding(path):
        return entry_input(entry)
    where = f"parameter: {name} = {str(path)!r}"
    if not path.is_dir():
        raise UserError(f"{where}: there is no folder {path.absolute()}")
    found = Manifest.of_directory(path)
    if not found.files:
        raise UserError(f"{where}: the folder is empty; expected {expected}")
    if (path / MANIFEST_NAME).is_file() and (problems := Manifest.read(path).differences(path)):
        raise UserError(
            f"{where}: the files differ from their {MANIFEST_NAME}: " + "; ".join(problems[:5])
        )
    return Input(path.absolute(), found.digest, str(path.absolute()))


def rows_input(key: str, place: Path | str) -> Input[Path]:
    """Rows, by the hash that `load_training` gives them; of several files, those of all.

    Args:
        key: the profile's key that names them, for the message.
        place: a file, a folder, a pattern of names, or the URI of what MLflow keeps.

    Raises:
        UserError: there are none.
    """
    try:
        path = local_rows(place)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
    if not (path.exists() or is_pattern(path)):
        raise UserError(f"{key}: there is no file {path.absolute()}")
    try:
        found = row_files(path)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
    return Input(path, found.digest, str(place), files=found.hashes)


def preceding_output(
    request: Request, cache: StepCache, name: str, step: str, *, in_mlflow: bool = False
) -> Entry:
    """What the step before last left for the profile.

    Args:
        request: says what was handed over or named, and for which profile.
        cache: where the outputs of earlier steps are.
        name: the parameter that wants it, for the message.
        step: the step that makes it.
        in_mlflow: whether that step's output lives in a tracking store.

    Raises:
        UserError: there is nothing; the message says which command makes it.
    """
    profile = request.profile.name
    if entry := cache.latest(profile, step, slot(step, in_mlflow=in_mlflow)):
        return entry
    raise UserError(
        f"parameter: {name} = 'auto': step {step} has left nothing for profile {profile} in "
        f"{cache.root}.\nRun  {run_command(step, profile=profile)}  first, or name one: "
        f"-P {name}=..."
    )


def entry_input(entry: Entry) -> Folder:
    """A cached output as the next step's input."""
    return Input(entry.path, entry.manifest.digest, str(entry.path), entry)
