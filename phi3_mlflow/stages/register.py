"""Register the logged model as a new version, with its provenance as tags and a model card.

    mlflow run . --env-manager local -e register -P profile=smollm2-135m
    python -m steps.register --profile smollm2-135m --model-uri models:/m-...

A new version gets the alias `challenger`. Registering copies nothing: the version points to the
logged model. A model of the same content, flavor and contract makes no second version, and an alias
that is at a later version stays there; `-P force=true` moves it back, and says so. Where the
profile says `trust.sign_with`, the version's files and its provenance are signed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from phi3_mlflow.artifacts.inputs import Input
from phi3_mlflow.artifacts.provenance import TRAINING_TAGS
from phi3_mlflow.core import console
from phi3_mlflow.core.errors import UserError
from phi3_mlflow.pipeline.inputs import preceding_output
from phi3_mlflow.pipeline.step import Settings, Step, Work, step_parameters
from phi3_mlflow.stages.card import model_card
from phi3_mlflow.stages.records import (
    LoggedModel,
    LoggedModels,
    RegisteredVersion,
    RegisteredVersions,
)
from phi3_mlflow.tracking import registry
from phi3_mlflow.tracking.connection import connect, tracking_identity
from phi3_mlflow.tracking.stored_files import refuse_damaged
from phi3_mlflow.trust.attestations import sign_version

if TYPE_CHECKING:
    from phi3_mlflow.artifacts.cache import Entry, StepCache
    from phi3_mlflow.config.parameters import Request


@dataclass(frozen=True)
class RegisterInputs:
    """Logged models."""

    model_uri: Input[tuple[LoggedModel, ...]]


class Register(Step[RegisterInputs, RegisteredVersions]):
    """Logged model to version of a registered model."""

    name = "register"
    doing = "registering the logged model as a version"
    parameters = step_parameters("model_uri", "registered_model")
    record_type = RegisteredVersions
    in_mlflow = True
    in_main_process = True

    def inputs(self, request: Request, cache: StepCache) -> RegisterInputs:
        connect()
        models = [logged_model(uri) for uri in _model_uris(request, cache)]
        identity = " ".join(model.model_id for model in models)
        shown = " ".join(model.model_uri for model in models)
        return RegisterInputs(Input(tuple(models), identity, shown))

    def settings(self, request: Request) -> Settings:
        return {
            "registered_model": request.profile.registered_model,
            "tracking": tracking_identity(),
        }

    def work(self, work: Work[RegisterInputs]) -> None:
        profile = work.request.profile
        versions = []
        for model in work.inputs.model_uri.value:
            tags = {**model.tags, "profile": profile.name}
            made = registry.register(
                model.model_uri, profile.registered_model, tags, model_card(profile, tags)
            )
            console.say(f"  {made.uri} ({model.flavor})")
            versions.append(
                RegisteredVersion(name=made.name, version=made.version, flavor=model.flavor)
            )
        record = RegisteredVersions(versions=tuple(versions))
        _challenge(record.challenger, moves_back=work.request.flag("force"))
        record.write(work.out)

    def after(self, request: Request, entry: Entry) -> None:
        """Say what the registered model is, where nobody has, and sign what is not signed yet."""
        profile = request.profile
        text = (
            f"{profile.description}\n\nVersions of {profile.base_model} ({profile.licence}). The "
            f"alias `{registry.CHAMPION}` is the version that passed the gate, "
            f"`{registry.CHALLENGER}` the one registered last."
        )
        registry.describe_model(profile.registered_model, text)
        if profile.trust.sign_with is not None:
            run_id = str(entry.origin.get("run_id", "")) or None
            for version in self.record_of(entry).versions:
                if sign_version(version.version_name, profile.trust.sign_with, run_id):
                    console.say(f"  signed {version.version_name.uri}")

    def missing(self, entry: Entry) -> str | None:
        for version in self.record_of(entry).versions:
            if not registry.exists(version.version_name):
                return f"version {version.version_name.uri} is no longer in the registry"
        return None


def _challenge(version: registry.VersionName, *, moves_back: bool) -> None:
    """Make a version the challenger, and say where the alias is when that is a later one."""
    later = registry.advance_alias(version, registry.CHALLENGER)
    if later is None:
        return
    if moves_back:
        registry.set_alias(version, registry.CHALLENGER)
        console.say(
            f"  {version.uri} is the same model, registered before; the alias challenger moved "
            f"back to it from version {later}"
        )
    else:
        console.say(
            f"  {version.uri} is the same model, registered before; the alias challenger stays "
            f"with version {later}. To move it back: -e register -P force=true"
        )


def _model_uris(request: Request, cache: StepCache) -> list[str]:
    logged = request.handed("model_uri", LoggedModels)
    if logged is None and request.is_auto("model_uri"):
        entry = preceding_output(request, cache, "model_uri", "log", in_mlflow=True)
        logged = LoggedModels.read(entry.path)
    if logged is None:
        return request.value("model_uri").replace(",", " ").split()
    return [model.model_uri for model in logged.models]


def logged_model(uri: str) -> LoggedModel:
    """What MLflow knows of a logged model.

    Raises:
        UserError: there is no such model.
        EnvironmentProblem: its files are damaged.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        info = mlflow.models.get_model_info(uri)
        tags = dict(mlflow.get_logged_model(info.model_id).tags) if info.model_id else {}
    except (MlflowException, OSError) as error:
        refuse_damaged(uri)
        raise UserError(
            f"parameter: model_uri = {uri!r}: there is no such logged model: {error}\n"
            "Give models:/m-... (from the log step), or runs:/RUN_ID/NAME."
        ) from error
    refuse_damaged(f"models:/{info.model_id}")
    tags.setdefault("flavor", "transformers" if "transformers" in info.flavors else "onnx")
    kept = (*registry.VERSION_TAGS, *TRAINING_TAGS, registry.CONTENT)
    return LoggedModel(
        flavor=tags["flavor"],
        model_id=info.model_id or info.model_uuid,
        model_uri=uri,
        tags={key: str(value) for key, value in tags.items() if key in kept},
    )


STEP = Register()
