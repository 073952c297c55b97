"""Log the model to MLflow, in the ONNX flavor, the transformers flavor, or both.

    mlflow run . -e log -P profile=smollm2-135m
    python -m steps.log --profile smollm2-135m --flavor transformers

Both flavors take MLflow's chat request and give the same OpenAI-shaped answer. Nothing is pickled:
the ONNX flavor is models-from-code over onnxruntime-genai, complete in itself.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from phi3_mlflow.artifacts.cache import Entry, StepCache
from phi3_mlflow.artifacts.provenance import content_digest, read_provenance
from phi3_mlflow.checkpoints.layout import licence_files
from phi3_mlflow.config.parameters import Request
from phi3_mlflow.pipeline.recipe import METADATA_KEY, recipe_of
from phi3_mlflow.pipeline.step import (
    CHECKPOINT,
    ONNX,
    Input,
    Step,
    Work,
    folder_input,
    library_versions,
    read_record,
)
from phi3_mlflow.stages import export, fetch, quantize
from phi3_mlflow.stages.card import model_card
from phi3_mlflow.tracking.runs import git_commit, tracking_identity


def flavors(request: Request) -> list[str]:
    flavor = request.profile.flavor
    return ["onnx", "transformers"] if flavor == "both" else [flavor]


def inputs(request: Request, store: StepCache) -> dict[str, Input]:
    found = {}
    for flavor in flavors(request):
        onnx = flavor == "onnx"
        name, before, what = (
            ("onnx", "export", ONNX) if onnx else ("checkpoint", "fetch", CHECKPOINT)
        )
        found[name] = folder_input(request, store, name, before, what)
    return found


def settings(request: Request) -> dict[str, Any]:
    profile = request.profile
    return {
        "flavor": profile.flavor,
        "contract": profile.contract,
        "runtime": profile.runtime.model_dump(mode="json"),
        "tracking": tracking_identity(),
    }


def work(work: Work) -> None:
    models = []
    for flavor in flavors(work.request):
        directory = work.inputs["onnx" if flavor == "onnx" else "checkpoint"].path
        tags = version_tags(flavor, directory)
        model_id = find_logged(work, flavor)
        if model_id is None:
            log = log_onnx_model if flavor == "onnx" else log_transformers_model
            try:
                model_id = log(work, directory, tags | {"step_key": work.key}).model_id
            except BaseException:
                with suppress(Exception):  # what went wrong is to be told, not this
                    find_logged(work, flavor)
                raise
        uri = f"models:/{model_id}"
        models.append({"flavor": flavor, "model_id": model_id, "model_uri": uri, "tags": tags})
    work.record({"models": models})


def find_logged(work: Work, flavor: str) -> str | None:
    """The model that an earlier run logged before it was killed, when it is whole.

    A model that was left unfinished is deleted, its files too: nobody else works under this key.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    client = MlflowClient()
    found = None
    for model in client.search_logged_models(
        [work.run.experiment_id],
        f"tags.step_key = '{work.key}' and tags.flavor = '{flavor}'",
    ):
        if str(model.status) != "READY":
            # The files first: MLflow leaves them where they are.
            with suppress(MlflowException, OSError, NotImplementedError):
                if model.model_id in model.artifact_location:
                    get_artifact_repository(model.artifact_location).delete_artifacts()
            client.delete_logged_model(model.model_id)
        elif not work.request.flag("force") and not _trouble(model.model_id):
            found = str(model.model_id)
    return found


def log_onnx_model(work: Work, directory: Path, tags: dict[str, str]) -> Any:
    from phi3_mlflow.flavors.onnx import log_onnx
    from phi3_mlflow.flavors.bundle import requirements

    profile = work.request.profile
    return log_onnx(
        directory,
        name=profile.registered_model,
        contract=profile.contract,
        model_config=profile.runtime.model_dump(mode="json", exclude_none=True),
        metadata=metadata(work, directory),
        tags=tags,
        model_card=model_card(profile, tags),
        license_text=licence_text(directory),
        pip_requirements=requirements("onnx"),
    )


def log_transformers_model(work: Work, directory: Path, tags: dict[str, str]) -> Any:
    from phi3_mlflow.flavors.bundle import requirements
    from phi3_mlflow.flavors.transformers import log_transformers

    profile = work.request.profile
    return log_transformers(
        directory,
        name=profile.registered_model,
        dtype="auto",
        model_config=profile.runtime.model_dump(mode="json", exclude_none=True),
        metadata=metadata(work, directory),
        tags=tags,
        model_card=model_card(profile, tags),
        license_text=licence_text(directory),
        pip_requirements=requirements("transformers"),
    )


def licence_text(directory: Path) -> str | None:
    """The licence and notices that came with the model, one after another."""
    texts = [file.read_text("utf-8", errors="replace") for file in licence_files(directory)]
    return "\n\n".join(text.strip() for text in texts) + "\n" if texts else None


def metadata(work: Work, directory: Path) -> dict[str, Any]:
    """What the model carries about itself: its licence, and how to make it again."""
    profile = work.request.profile
    known: dict[str, Any] = {"licence": profile.licence, "base_model": profile.base_model}
    libraries = library_versions(fetch.STEP, quantize.STEP, export.STEP)
    recipe = recipe_of(profile, directory, fetch.base_directory(work.request), libraries)
    return known if recipe is None else known | {METADATA_KEY: recipe.metadata()}


def version_tags(flavor: str, directory: Path) -> dict[str, str]:
    """The tags of the version that the model becomes."""
    known = read_provenance(directory)
    return {
        "flavor": flavor,
        "precision": str(known.get("precision", "as the checkpoint")),
        "algorithm": str(known.get("algorithm", "none")),
        "source": str(known.get("source", "unknown")),
        "source_revision": str(known.get("source_revision", "unknown")),
        "checkpoint_sha256": str(known.get("checkpoint_sha256", "unknown")),
        "artifact_sha256": str(known.get("artifact_sha256") or content_digest(directory)),
        "git_commit": git_commit(),
    }


def still_there(entry: Entry) -> str | None:
    from phi3_mlflow.tracking.runs import connect

    connect()
    troubles = (_trouble(model["model_id"]) for model in read_record(entry)["models"])
    return next(filter(None, troubles), None)


def _trouble(model_id: str) -> str | None:
    """What is wrong with a logged model, if anything is."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient()
    try:
        found = client.get_logged_model(model_id)
    except MlflowException:
        return f"the logged model {model_id} is no longer in MLflow"
    if str(found.status) != "READY":
        return f"the logged model {model_id} is {found.status}"
    if not any(f.path.endswith("MLmodel") for f in client.list_logged_model_artifacts(model_id)):
        return f"the files of the logged model {model_id} are gone"
    return None


STEP = Step(
    name="log",
    summary="logging the model to MLflow",
    parameters=("checkpoint", "onnx", "flavor", "contract"),
    inputs=inputs,
    settings=settings,
    work=work,
    copies=(
        "phi3_mlflow.flavors.chat_model",
        "phi3_mlflow.flavors.prompt_model",
        "phi3_mlflow.runtime.python_model",
    ),
    still_there=still_there,
)
