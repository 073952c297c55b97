"""Logging the transformers flavor: MLflow's own, with the project's own runtime for pyfunc.

`mlflow.transformers.log_model(task="llm/v1/chat")` lays the checkpoint out, so that
`mlflow.transformers.load_model` gives the Hugging Face pipeline. Its pyfunc wrapper however
answers the chat schema with faults that a client notices (a list in place of the answer, a local
path as `model`, errors for `temperature` 0 and for `stop` on another machine, "stop" where the
length ended the answer; see docs/chat-contract.md). So the `python_function` flavor of what was
logged is pointed at the same models-from-code file that the ONNX flavor uses.

A fine-tuned model is logged as its merged checkpoint, or as the checkpoint before training and the
adapter. Where MLflow saves a PEFT model itself, it writes down where the base model lies on this
machine; here both are in the logged folder, and the MLmodel file names them relative to itself:

    model/   the checkpoint     components/tokenizer/     peft/   the adapter
"""

from __future__ import annotations

import json
import tempfile
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_mlflow.artifacts.manifests import MANIFEST_NAME, FileEntry, Manifest, sha256_of_file
from phi3_mlflow.artifacts.provenance import TRAINING_FILES
from phi3_mlflow.core.errors import UserError
from phi3_mlflow.flavors import bundle
from phi3_mlflow.tracking.stored_files import ADDED, folder_of, listed_sizes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mlflow.models import Model
    from mlflow.models.model import ModelInfo

    from phi3_mlflow.runtime.model_config import ModelConfig

DTYPES = ("float32", "bfloat16", "float16")
TASK = "llm/v1/chat"
_ADAPTER = "peft"  # as MLflow has it


def log_transformers(
    checkpoint: Path,
    *,
    name: str,
    dtype: str,
    model_config: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    tags: dict[str, str] | None = None,
    params: Mapping[str, Any] | None = None,
    input_example: Mapping[str, Any] | None = None,
    pip_requirements: list[str] | None = None,
    model_card: str | None = None,
    license_text: str | None = None,
    bom: str | None = None,
    adapter: Path | None = None,
) -> ModelInfo:
    """Log a Hugging Face checkpoint directory as an MLflow LoggedModel.

    The weights are copied as files and never loaded. The active run becomes the source run.

    Args:
        checkpoint: holds config.json, the weights as safetensors, the tokenizer.
        name: of the logged model, and of the `model` in its answers unless `model_config` says
            otherwise.
        dtype: number type the weights are loaded as: float32, bfloat16, float16, or `auto` for the
            one that the checkpoint's config.json names. It is written down in either case.
        model_config: values of `runtime.model_config.ModelConfig`; all can be overridden when
            loading.
        metadata: goes into the MLmodel file.
        tags: of the LoggedModel.
        params: of the LoggedModel.
        input_example: a request; default: one of the contract's own.
        pip_requirements: default: `bundle.requirements("transformers")`.
        model_card: a text, kept as model_card.md with the model.
        license_text: a text, kept as LICENSE.txt with the model.
        bom: the bill of materials, kept as bom.cdx.json with the model.
        adapter: a folder with a LoRA adapter for the checkpoint, in PEFT's format.

    Returns:
        MLflow's ModelInfo: `model_uri`, `model_id`, `signature` and more.

    Raises:
        UserError: the directory is not a checkpoint, or a value is not known.
    """
    import mlflow
    import torch

    if not (checkpoint / "config.json").is_file():
        raise UserError(f"{checkpoint} is not a Hugging Face checkpoint: it has no config.json")
    dtype = _dtype(checkpoint) if dtype == "auto" else dtype
    if dtype not in DTYPES:
        raise UserError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}, auto")
    config = bundle.checked_config({"model_name": name, "dtype": dtype, **(model_config or {})})
    needed = pip_requirements or bundle.requirements("transformers", adapter=adapter is not None)
    with _of_the_model(checkpoint) as folder:
        info = mlflow.transformers.log_model(
            transformers_model=str(folder.resolve()),
            name=bundle.logged_name(name),
            task=TASK,
            torch_dtype=getattr(torch, dtype),
            input_example=input_example or bundle.CHAT_EXAMPLE,
            pip_requirements=needed,
            model_card=_card(model_card),
            metadata=metadata,
            params=params,
            tags=tags,
        )
        documents = (license_text or _licence_unknown(name), bom)
        info = _put_runtime(info, config, documents, adapter, folder)
    return info


@contextmanager
def _of_the_model(checkpoint: Path) -> Iterator[Path]:
    """A folder with the files that make up the model, without what is kept of its training."""
    if not any((checkpoint / name).exists() for name in TRAINING_FILES):
        yield checkpoint
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "checkpoint"
        # The manifest lists what is left out.
        bundle.link_files(checkpoint, folder, (*TRAINING_FILES, MANIFEST_NAME))
        yield folder


def _dtype(checkpoint: Path) -> str:
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    # transformers 5 writes `dtype`, older ones `torch_dtype`; without either it loads as float32.
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def _put_runtime(
    info: ModelInfo,
    config: ModelConfig,
    documents: tuple[str, str | None],
    adapter: Path | None,
    checkpoint: Path,
) -> ModelInfo:
    """Replace the pyfunc wrapper of a model that was just logged, and the paths it gives away."""
    import mlflow
    from mlflow.entities import LoggedModelStatus
    from mlflow.models import Model
    from mlflow.models.model import MLMODEL_FILE_NAME

    client = mlflow.MlflowClient()
    try:
        model = Model.load(info.model_uri)
        _describe(model, config, with_adapter=adapter is not None)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            bundle.copy_code("chat", folder)
            bundle.write_documents(folder, None, *documents)
            if adapter is not None:
                bundle.link_files(adapter, folder / _ADAPTER)
            # Last: until the MLmodel file names the runtime, the model is MLflow's own, and whole.
            client.log_model_artifacts(info.model_id, str(folder))
            model.save(str(folder / MLMODEL_FILE_NAME))
            client.log_model_artifact(info.model_id, str(folder / MLMODEL_FILE_NAME))
        _list_files(info, checkpoint)
    except BaseException:
        client.finalize_logged_model(info.model_id, LoggedModelStatus.FAILED)
        raise
    return model.get_model_info(client.get_logged_model(info.model_id))


def _list_files(info: ModelInfo, checkpoint: Path) -> None:
    """Put a manifest beside the files of a model that was just logged.

    A store that is no folder of this machine has the weights as they are in the checkpoint, when
    they are as large there; what else it has is small, and is downloaded.
    """
    import mlflow
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    client = mlflow.MlflowClient()
    repository = get_artifact_repository(client.get_logged_model(info.model_id).artifact_location)
    place = folder_of(repository)
    entries = []
    with tempfile.TemporaryDirectory() as temporary:
        for path, size in sorted(listed_sizes(repository).items()):
            if path == ADDED:
                continue
            file = checkpoint / path.removeprefix("model/")
            if place is not None:
                file = place / path
            elif not (path.startswith("model/") and file.is_file() and _size(file) == size):
                file = Path(repository.download_artifacts(path, dst_path=temporary))  # type: ignore[no-untyped-call, unused-ignore]
            entries.append(FileEntry(path, _size(file), sha256_of_file(file)))
        manifest = Manifest(tuple(entries))
        manifest.write(Path(temporary))
        client.log_model_artifact(info.model_id, str(Path(temporary) / MANIFEST_NAME))
    bundle.mark_files(info.model_id, manifest.digest)


def _size(file: Path) -> int:
    return file.stat().st_size


def _describe(model: Model, config: ModelConfig, *, with_adapter: bool) -> None:
    pipeline = model.flavors["transformers"]
    pipeline["source_model_name"] = config.model_name  # was the path of the checkpoint here
    pyfunc = model.flavors["python_function"]
    artifacts = {"checkpoint": "model", "tokenizer": "components/tokenizer"}
    if with_adapter:
        pipeline["peft_adaptor"] = artifacts["adapter"] = _ADAPTER
    pyfunc.update(
        loader_module="mlflow.pyfunc.loaders.code_model",
        model_code_path=bundle.code_file("chat").name,
        streamable=True,
        config=asdict(config),
        artifacts={name: {"path": path, "uri": path} for name, path in artifacts.items()},
    )
    model.signature = bundle.signature("chat")


def _card(text: str | None) -> Any:
    from huggingface_hub import ModelCard

    # Without a card MLflow asks the hub for one, by the path of the checkpoint.
    return ModelCard(text if text is not None else "---\n{}\n---\n", ignore_metadata_errors=True)


def _licence_unknown(name: str) -> str:
    return f"No licence text was given when {name} was logged; see the source of the model.\n"
