"""Log the model to MLflow, in the ONNX flavor, the transformers flavor, or both.

    mlflow run . --env-manager local -e log -P profile=smollm2-135m
    python -m steps.log --profile smollm2-135m --flavor transformers

Both flavors take MLflow's chat request and give the same OpenAI-shaped answer. Nothing is pickled:
the ONNX flavor is models-from-code over onnxruntime-genai, complete in itself.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phi3_mlflow.artifacts.cache import key_of
from phi3_mlflow.artifacts.code_keys import closure, modules_in
from phi3_mlflow.artifacts.provenance import (
    ADAPTER_FOLDER,
    LOGGED_AS,
    TRAINING_KEYS,
    TRAINING_TAGS,
    content_digest,
    read_provenance,
)
from phi3_mlflow.checkpoints.layout import licence_files
from phi3_mlflow.core import console
from phi3_mlflow.core.errors import UserError
from phi3_mlflow.core.git import origin
from phi3_mlflow.pipeline.inputs import (
    ONNX,
    entry_input,
    folder_input,
    full_precision,
    preceding_output,
)
from phi3_mlflow.pipeline.recipe import METADATA_KEY, recipe_of
from phi3_mlflow.pipeline.step import Settings, Step, Work, step_parameters
from phi3_mlflow.stages.card import front_matter, model_card
from phi3_mlflow.stages.records import LoggedModel, LoggedModels
from phi3_mlflow.tracking import registry
from phi3_mlflow.tracking.connection import connect, tracking_identity
from phi3_mlflow.tracking.stored_files import trouble
from phi3_mlflow.trust.bom import Described, bom_text

if TYPE_CHECKING:
    from pathlib import Path

    from mlflow.models.model import ModelInfo

    from phi3_mlflow.artifacts.cache import Entry, StepCache
    from phi3_mlflow.artifacts.inputs import Folder
    from phi3_mlflow.config.parameters import Request
    from phi3_mlflow.flavors.bundle import Flavor


@dataclass(frozen=True)
class LogInputs:
    """What goes into the model: an ONNX directory, a checkpoint, or both.

    `base` is the checkpoint before training, where the model is logged as that and an adapter.
    """

    onnx: Folder | None
    checkpoint: Folder | None
    base: Folder | None = None

    def folder(self, flavor: str) -> Path:
        """The files of a flavor.

        Raises:
            LookupError: they were not asked for.
        """
        given = self.onnx if flavor == "onnx" else self.checkpoint
        if given is None:
            raise LookupError(flavor)
        return given.value


class Log(Step[LogInputs, LoggedModels]):
    """ONNX directory or checkpoint to logged model."""

    name = "log"
    doing = "logging the model to MLflow"
    parameters = step_parameters("checkpoint", "onnx", "flavor", "contract")
    record_type = LoggedModels
    in_mlflow = True
    copies = (
        "phi3_mlflow.flavors.chat_model",
        "phi3_mlflow.flavors.prompt_model",
        *modules_in("phi3_mlflow.runtime"),
    )

    def inputs(self, request: Request, cache: StepCache) -> LogInputs:
        chosen = flavors(request)
        return LogInputs(
            folder_input(request, cache, "onnx", "export", ONNX) if "onnx" in chosen else None,
            full_precision(request, cache) if "transformers" in chosen else None,
            _base(request, cache) if log_as(request) == "adapter" else None,
        )

    def settings(self, request: Request) -> Settings:
        from phi3_mlflow.flavors.bundle import requirements

        profile = request.profile
        return {
            "flavor": profile.flavor,
            "contract": profile.contract,
            "requirements": {
                flavor: requirements(flavor, adapter=_with_adapter(request, flavor))
                for flavor in flavors(request)
            },
            "runtime": profile.runtime.model_dump(mode="json"),
            "tracking": tracking_identity(),
        }

    def work(self, work: Work[LogInputs]) -> None:
        models = []
        for flavor in flavors(work.request):
            directory = work.inputs.folder(flavor)
            tags = version_tags(flavor, directory)
            if "adapter_sha256" in tags:
                adapted = _with_adapter(work.request, flavor)
                tags[LOGGED_AS] = "adapter" if adapted else "merged"
            tags[registry.CONTENT] = content_key(self, work, flavor, tags["artifact_sha256"])
            model_id = find_logged(work, flavor) or find_same(work, tags[registry.CONTENT])
            if model_id is None:
                log = log_onnx_model if flavor == "onnx" else log_transformers_model
                try:
                    model_id = log(work, directory, tags | {"step_key": work.key}).model_id
                except BaseException:
                    with suppress(Exception):  # what went wrong is to be told, not this
                        find_logged(work, flavor)
                    raise
            uri = f"models:/{model_id}"
            models.append(LoggedModel(flavor=flavor, model_id=model_id, model_uri=uri, tags=tags))
        LoggedModels(models=tuple(models)).write(work.out)

    def missing(self, entry: Entry) -> str | None:
        connect()
        troubles = (trouble(model.model_id) for model in self.record_of(entry).models)
        return next(filter(None, troubles), None)


def flavors(request: Request) -> list[Flavor]:
    """The flavors that the profile asks for, the one that may become champion first."""
    flavor = request.profile.flavor
    return ["onnx", "transformers"] if flavor == "both" else [flavor]


def log_as(request: Request) -> str:
    """What the transformers flavor is logged as: `merged`, or `adapter` for base and adapter."""
    trains = request.profile.train
    asked = trains is not None and "transformers" in flavors(request)
    return trains.log_as if trains and asked else "merged"


def _with_adapter(request: Request, flavor: Flavor) -> bool:
    return flavor == "transformers" and log_as(request) == "adapter"


def _base(request: Request, cache: StepCache) -> Folder:
    """The checkpoint as it was fetched."""
    return entry_input(preceding_output(request, cache, "checkpoint", "fetch"))


def base_and_adapter(inputs: LogInputs) -> tuple[Path, Path]:
    """The checkpoint before training, and the adapter.

    Raises:
        UserError: the checkpoint has no adapter, or one for another checkpoint.
    """
    trained = inputs.folder("transformers")
    adapter = trained / ADAPTER_FOLDER
    if inputs.base is None or not adapter.is_dir():
        raise UserError(
            f"train.log_as is 'adapter', and {trained} has no folder {ADAPTER_FOLDER}: it was not "
            "left by the step train. Set train.log_as to 'merged'."
        )
    trained_on = read_provenance(trained).get("base_checkpoint_sha256")
    base = inputs.base.value
    if trained_on != (read_provenance(base).get("checkpoint_sha256") or content_digest(base)):
        raise UserError(
            f"train.log_as is 'adapter', and the adapter in {trained} was trained on another "
            f"checkpoint than {base}, which fetch left last. Run train again, or set train.log_as "
            "to 'merged'."
        )
    return base, adapter


def find_logged(work: Work[LogInputs], flavor: str) -> str | None:
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
        elif not work.request.flag("force") and not trouble(model.model_id):
            found = str(model.model_id)
    return found


def content_key(step: Log, work: Work[LogInputs], flavor: Flavor, artifact: str) -> str:
    """What tells a logged model from others: its files, how it takes requests and what answers.

    Not which other flavor was logged with it, nor how the address of the store is spelled.
    """
    settings = work.settings
    return key_of(
        {
            "artifact": artifact,
            "code": closure(step.copies).hashes(),
            "contract": settings["contract"],
            "flavor": flavor,
            "name": work.request.profile.registered_model,
            "requirements": settings["requirements"][flavor],
            "runtime": settings["runtime"],
        }
    )


def find_same(work: Work[LogInputs], content: str) -> str | None:
    """A model of the same content that is whole, logged by any run; the first of them."""
    from mlflow import MlflowClient

    if work.request.flag("force"):
        return None
    models = MlflowClient().search_logged_models(
        [work.run.experiment_id],
        f"tags.{registry.CONTENT} = '{content}'",
        order_by=[{"field_name": "creation_time", "ascending": True}],
    )
    for model in models:
        if str(model.status) == "READY" and not trouble(model.model_id):
            console.say(f"  the same model is logged already: {model.model_id}")
            return str(model.model_id)
    return None


def log_onnx_model(work: Work[LogInputs], directory: Path, tags: dict[str, str]) -> ModelInfo:
    """Log the ONNX flavor."""
    from phi3_mlflow.flavors.bundle import requirements
    from phi3_mlflow.flavors.onnx import log_onnx

    profile = work.request.profile
    return log_onnx(
        directory,
        name=profile.registered_model,
        contract=profile.contract,
        model_config=profile.runtime.for_loading(),
        metadata=metadata(work, directory),
        tags=tags,
        model_card=front_matter(profile, tags) + model_card(profile, tags),
        license_text=licence_text(directory),
        bom=bill_of_materials(work, directory, tags, requirements("onnx")),
        pip_requirements=requirements("onnx"),
    )


def log_transformers_model(
    work: Work[LogInputs], directory: Path, tags: dict[str, str]
) -> ModelInfo:
    """Log the transformers flavor."""
    from phi3_mlflow.flavors.bundle import requirements
    from phi3_mlflow.flavors.transformers import log_transformers

    profile = work.request.profile
    base, adapter = directory, None
    needed = requirements("transformers", adapter=_with_adapter(work.request, "transformers"))
    if _with_adapter(work.request, "transformers"):
        base, adapter = base_and_adapter(work.inputs)
    return log_transformers(
        base,
        name=profile.registered_model,
        dtype="auto",
        model_config=profile.runtime.for_loading(),
        metadata=metadata(work, directory),
        tags=tags,
        model_card=front_matter(profile, tags) + model_card(profile, tags),
        license_text=licence_text(directory),
        bom=bill_of_materials(work, directory, tags, needed),
        pip_requirements=needed,
        adapter=adapter,
    )


def bill_of_materials(
    work: Work[LogInputs], directory: Path, tags: dict[str, str], needed: list[str]
) -> str:
    """What the model consists of and what it was made from, as CycloneDX."""
    profile = work.request.profile
    recipe = recipe_of(profile, directory, work.request.base_directory)
    described = Described(
        name=profile.registered_model,
        description=profile.description,
        base_model=profile.base_model,
        licence=profile.licence,
        training_data=profile.training_data,
        tags={key: tags[key] for key in (*registry.VERSION_TAGS, *TRAINING_TAGS) if key in tags},
        recipe=recipe.metadata() if recipe else None,
        requirements=needed,
    )
    return bom_text(described)


def licence_text(directory: Path) -> str | None:
    """The licence and notices that came with the model, one after another."""
    texts = [file.read_text("utf-8", errors="replace") for file in licence_files(directory)]
    return "\n\n".join(text.strip() for text in texts) + "\n" if texts else None


def metadata(work: Work[LogInputs], directory: Path) -> dict[str, Any]:
    """What the model carries about itself: its licence, and how to make it again."""
    profile = work.request.profile
    known: dict[str, Any] = {"licence": profile.licence, "base_model": profile.base_model}
    recipe = recipe_of(profile, directory, work.request.base_directory)
    return known if recipe is None else known | {METADATA_KEY: recipe.metadata()}


def version_tags(flavor: str, directory: Path) -> dict[str, str]:
    """The tags of the version that the model becomes."""
    known = read_provenance(directory)
    trained = {name: str(known[name]) for name in TRAINING_KEYS if name in known}
    return trained | {
        "flavor": flavor,
        "precision": str(known.get("precision", "as the checkpoint")),
        "algorithm": str(known.get("algorithm", "none")),
        "source": str(known.get("source", "unknown")),
        "source_revision": str(known.get("source_revision", "unknown")),
        "checkpoint_sha256": str(known.get("checkpoint_sha256", "unknown")),
        "artifact_sha256": str(known.get("artifact_sha256") or content_digest(directory)),
        "git_commit": origin().commit,
    }


STEP = Log()
