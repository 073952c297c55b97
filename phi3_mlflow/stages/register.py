"""Register the logged model as a new version, with its provenance as tags and a model card.

    mlflow run . -e register -P profile=smollm2-135m
    python -m steps.register --profile smollm2-135m --model-uri models:/m-...

The version gets the alias `challenger`. Registering copies nothing: the version points to the
logged model. The same logged model again makes no second version.
"""

from __future__ import annotations

from typing import Any

from phi3_mlflow.artifacts.cache import Entry, StepCache
from phi3_mlflow.config.parameters import Request
from phi3_mlflow.core import console
from phi3_mlflow.core.errors import UserError
from phi3_mlflow.pipeline.step import Input, Step, Work, preceding_output, read_record
from phi3_mlflow.stages.card import model_card
from phi3_mlflow.tracking import registry
from phi3_mlflow.tracking.runs import tracking_identity


def inputs(request: Request, store: StepCache) -> dict[str, Input]:
    if request.is_auto("model_uri"):
        entry = preceding_output(request, store, "model_uri", "log")
        uris = [model["model_uri"] for model in read_record(entry)["models"]]
    else:
        uris = request.value("model_uri").replace(",", " ").split()
    models = [_logged_model(uri) for uri in uris]
    digest = " ".join(model["identity"] for model in models)
    return {"model_uri": Input(" ".join(uris), digest, {"models": models})}


def _logged_model(uri: str) -> dict[str, Any]:
    """What MLflow knows of a logged model.

    Raises:
        UserError: there is no such model.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    from phi3_mlflow.tracking.runs import connect

    connect()
    try:
        info = mlflow.models.get_model_info(uri)
        tags = dict(mlflow.get_logged_model(info.model_id).tags) if info.model_id else {}
    except (MlflowException, OSError) as error:
        raise UserError(
            f"parameter: model_uri = {uri!r}: there is no such logged model: {error}\n"
            "Give models:/m-... (from the log step), or runs:/RUN_ID/NAME."
        ) from error
    tags.setdefault("flavor", "transformers" if "transformers" in info.flavors else "onnx")
    known = {key: str(value) for key, value in tags.items() if key in registry.VERSION_TAGS}
    identity = info.model_id or info.model_uuid
    return {"flavor": tags["flavor"], "model_uri": uri, "identity": identity, "tags": known}


def settings(request: Request) -> dict[str, Any]:
    return {
        "registered_model": request.profile.registered_model,
        "tracking": tracking_identity(),
    }


def work(work: Work) -> None:
    profile = work.request.profile
    versions = []
    for model in work.inputs["model_uri"].facts["models"]:
        tags = {**model["tags"], "profile": profile.name}
        made = registry.register(
            model["model_uri"], profile.registered_model, tags, model_card(profile, tags)
        )
        console.say(f"  {made.uri} ({model['flavor']})")
        versions.append({"name": made.name, "version": made.version, "flavor": model["flavor"]})
    work.record({"versions": versions})


def challenger(entry: Entry) -> registry.VersionName:
    """The version that may become champion: the ONNX one where there are two."""
    versions = read_record(entry)["versions"]
    first = next((v for v in versions if v["flavor"] == "onnx"), versions[0])
    return registry.VersionName(first["name"], first["version"])


def after(request: Request, entry: Entry) -> None:
    registry.set_alias(challenger(entry), registry.CHALLENGER)


def still_there(entry: Entry) -> str | None:
    for version in read_record(entry)["versions"]:
        name = registry.VersionName(version["name"], version["version"])
        if not registry.exists(name):
            return f"version {name.uri} is no longer in the registry"
    return None


STEP = Step(
    name="register",
    summary="registering the logged model as a version",
    parameters=("model_uri", "registered_model"),
    inputs=inputs,
    settings=settings,
    work=work,
    still_there=still_there,
    after=after,
    light=True,
)
