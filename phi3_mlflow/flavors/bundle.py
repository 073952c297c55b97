"""What both flavors share when a model is logged: its signature, its code, its requirements."""

from __future__ import annotations

import re
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from phi3_mlflow import runtime
from phi3_mlflow.artifacts.manifests import Manifest
from phi3_mlflow.core.errors import EnvironmentProblem, UserError
from phi3_mlflow.runtime.model_config import ModelConfig
from phi3_mlflow.tracking.stored_files import DIGEST
from phi3_mlflow.trust.bom import BOM_NAME

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from mlflow.models import ModelSignature

Contract = Literal["chat", "prompt"]
Flavor = Literal["onnx", "transformers"]

_HERE = Path(__file__).parent
_RUNTIME = Path(runtime.__file__).parent
_REQUIREMENTS: dict[str, tuple[str, ...]] = {
    "onnx": ("mlflow", "numpy", "jinja2", "tokenizers", "onnxruntime-genai", "onnxruntime"),
    # MLflow's transformers flavor loads with accelerate; a text model has no use for torchvision.
    "transformers": (
        "mlflow",
        "numpy",
        "jinja2",
        "tokenizers",
        "torch",
        "transformers",
        "accelerate",
    ),
}
# The distributions that bring the same modules for other hardware.
_ALTERNATIVES = {
    "onnxruntime-genai": ("onnxruntime-genai-cuda",),
    "onnxruntime": ("onnxruntime-gpu",),
}

CHAT_EXAMPLE: dict[str, Any] = {
    "messages": [{"role": "user", "content": "What is the capital of Spain?"}],
    "max_tokens": 32,
}
PROMPT_EXAMPLE: dict[str, Any] = {
    "prompt": (
        "<|system|>You are a stand-up comedian.<|end|>"
        "<|user|>Tell me a joke about atom<|end|><|assistant|>"
    )
}


def requirements(flavor: Flavor, *, adapter: bool = False) -> list[str]:
    """Pip requirements of a logged model: the versions installed here, exactly.

    A local version label (`2.13.0+cpu`) is left out: it names a build that other machines may not
    find, of the same release.

    Args:
        flavor: which one.
        adapter: the model is logged as a checkpoint and an adapter. MLflow's transformers flavor
            loads that with PEFT.

    Raises:
        EnvironmentProblem: one of them is not installed.
    """
    names = (*_REQUIREMENTS[flavor], *(("peft",) if adapter else ()))
    return [_pin(name) for name in names]


def _pin(name: str) -> str:
    for candidate in (name, *_ALTERNATIVES.get(name, ())):
        try:
            return f"{candidate}=={version(candidate).partition('+')[0]}"
        except PackageNotFoundError:
            continue
    raise EnvironmentProblem(
        f"{name} is not installed, so its version cannot be written into the model's requirements; "
        "install the project's environment (conda.yaml) and run the step in it"
    )


def signature(contract: Contract) -> ModelSignature:
    """The signature of a contract.

    Chat: inputs and outputs are MLflow's own chat schema. It has no column for `seed`, and MLflow
    removes what the schema does not know, so `seed` is a parameter of the signature: a served
    request carries it like any other field, `predict` takes it as `params={"seed": 1}`.
    Prompt: a text column `prompt`, and a text.
    """
    from mlflow.models import ModelSignature
    from mlflow.types.llm import CHAT_MODEL_INPUT_SCHEMA, CHAT_MODEL_OUTPUT_SCHEMA
    from mlflow.types.schema import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    seed = ParamSpec("seed", DataType.long, None)
    if contract == "chat":
        return ModelSignature(
            CHAT_MODEL_INPUT_SCHEMA, CHAT_MODEL_OUTPUT_SCHEMA, ParamSchema([seed])
        )
    sampling = [
        ParamSpec("temperature", DataType.double, None),
        ParamSpec("top_p", DataType.double, None),
        ParamSpec("max_tokens", DataType.long, None),
        ParamSpec("stop", DataType.string, [], shape=(-1,)),
        seed,
    ]
    return ModelSignature(
        Schema([ColSpec(DataType.string, "prompt")]),
        Schema([ColSpec(DataType.string)]),
        ParamSchema(sampling),
    )


def checked_config(values: Mapping[str, Any]) -> ModelConfig:
    """Check values of `model_config`, and complete them: all can be overridden at load time.

    Raises:
        UserError: a value is unknown or of the wrong kind.
    """
    try:
        return ModelConfig.read(values)
    except ValueError as error:
        raise UserError(str(error)) from error


def logged_name(name: str) -> str:
    """A model's name as MLflow takes it for a LoggedModel; registered models may have a dot."""
    return re.sub(r"[/:.%\"']", "-", name)


def code_file(contract: Contract) -> Path:
    """The models-from-code file of a contract."""
    return _HERE / f"{contract}_model.py"


def copy_code(contract: Contract, folder: Path) -> None:
    """Put the code that answers into a model's folder: the models-from-code file and `runtime`."""
    shutil.copyfile(code_file(contract), folder / code_file(contract).name)
    target = folder / _RUNTIME.name
    target.mkdir()
    for file in sorted(_RUNTIME.glob("*.py")):
        shutil.copyfile(file, target / file.name)


def link_files(source: Path, target: Path, leave_out: Collection[str] = ()) -> None:
    """Make `target` a directory with symbolic links to the files of `source`.

    Symbolic and not hard: they cross file systems, and MLflow's stores write what they point to.

    Args:
        source: an existing directory.
        target: a directory that does not exist.
        leave_out: names in `source` that are left out.
    """
    target.mkdir(parents=True)
    for entry in sorted(source.iterdir()):
        if entry.name in leave_out:
            continue
        if entry.is_dir():
            link_files(entry, target / entry.name)
        else:
            (target / entry.name).symlink_to(entry.resolve())


def write_documents(
    folder: Path, model_card: str | None, license_text: str | None, bom: str | None = None
) -> None:
    """Put documents into a model's folder: under MLflow's names where it has any.

    Args:
        folder: the model's.
        model_card: Markdown.
        license_text: licence and notices.
        bom: the bill of materials, CycloneDX as JSON.
    """
    if bom is not None:
        (folder / BOM_NAME).write_text(bom, encoding="utf-8")
    if model_card is not None:
        (folder / "model_card.md").write_text(model_card, encoding="utf-8")
    if license_text is not None:
        (folder / "LICENSE.txt").write_text(license_text, encoding="utf-8")


def list_files(folder: Path) -> str:
    """Write down the files of a model that is about to be stored, beside them.

    Returns:
        The digest of that manifest.
    """
    files = Manifest.of_directory(folder).files
    manifest = Manifest(tuple(file for file in files if "__pycache__" not in file.path))
    manifest.write(folder)
    return manifest.digest


def mark_files(model_id: str, digest: str) -> None:
    """Tag a logged model with the digest of its manifest, so that a changed manifest shows."""
    from mlflow import MlflowClient

    MlflowClient().set_logged_model_tags(model_id, {DIGEST: digest})
