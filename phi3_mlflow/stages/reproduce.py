"""Make a registered version again from its recipe, and say whether the bytes are the same.

    mlflow run . -e reproduce -P profile=smollm2-135m -P version=1
    python -m steps.reproduce --version models:/smollm2-135m@champion

Everything is done anew in a cache of its own: the source is fetched at the recorded revision, and
the steps run with the code of the version's commit and the settings it was made with. Ends with
code 0 when every file is the same, with code 4 when one differs. Registers nothing.
"""

from __future__ import annotations

import shutil
from typing import Any

from phi3_mlflow.artifacts.cache import StepCache
from phi3_mlflow.artifacts.manifests import Manifest
from phi3_mlflow.config.parameters import Request
from phi3_mlflow.core import console
from phi3_mlflow.core.errors import NotReproduced, UserError
from phi3_mlflow.pipeline.recipe import METADATA_KEY, Recipe
from phi3_mlflow.pipeline.reproduction import (
    Code,
    changed_libraries,
    code_at,
    rebuild,
    write_profile,
)
from phi3_mlflow.pipeline.step import ROOT, Input, Step, Work, library_versions
from phi3_mlflow.stages import export, fetch, quantize
from phi3_mlflow.tracking import registry
from phi3_mlflow.tracking.runs import close_child, git_commit, open_child, tracking_identity

_SHOWN = 5  # differing files


def inputs(request: Request, store: StepCache) -> dict[str, Input]:
    version = registry.find_version(request.value("version"), request.profile.registered_model)
    return {"version": Input(version.uri, f"{version.uri}#{registry.content(version)}")}


def settings(request: Request) -> dict[str, Any]:
    return {
        "registered_model": request.profile.registered_model,
        "tracking": tracking_identity(),
    }


def libraries() -> dict[str, str]:
    """The libraries that decide the bytes of an artifact, with their versions here."""
    return library_versions(fetch.STEP, quantize.STEP, export.STEP)


def work(work: Work) -> None:
    import mlflow

    version = registry.find_version(
        work.inputs["version"].location, work.request.profile.registered_model
    )
    tags = registry.describe(version).tags
    recipe = Recipe.read(mlflow.models.get_model_info(version.uri).metadata, version.uri)
    registered = tags.get("artifact_sha256", "")
    if recipe.files.digest != registered:
        raise UserError(
            f"{version.uri}: its tag artifact_sha256 ({registered}) is not the digest of the files "
            f"in its recipe ({recipe.files.digest}): one of the two was changed after it was made"
        )
    private = work.out / "again"
    private.mkdir()
    try:
        code = code_at(tags.get("git_commit", "unknown"), ROOT, git_commit(), private / "code")
        console.say(f"  {version.uri}, with the code of {code.commit}")
        profile = write_profile(recipe, code, private)
        made = rebuild(
            tags.get("flavor", "onnx"), profile, code, private / "cache", open_child, close_child
        )
    finally:
        shutil.rmtree(private, ignore_errors=True)
    result = compared(version, recipe, code, made)
    work.metrics["reproduced"] = float(result["same"])
    work.record(result)
    mlflow.log_metric("reproduced", float(result["same"]))
    mlflow.log_dict(result, "reproduction.json")
    mlflow.set_tags({"version": version.uri, "reproduced": str(result["same"]).lower()})
    if not result["same"]:
        raise NotReproduced(message(result, len(recipe.files.files)))
    console.say(f"  the same: {len(recipe.files.files)} files, artifact_sha256 {registered}")
    for note in notes(result):
        console.say(f"  {note}")


def compared(
    version: registry.VersionName, recipe: Recipe, code: Code, made: Manifest
) -> dict[str, Any]:
    """What came out, as JSON values."""
    return {
        "version": version.uri,
        "same": made.digest == recipe.files.digest,
        "artifact_sha256": {"registered": recipe.files.digest, "made_again": made.digest},
        "differences": recipe.files.changes(made),
        "code": {"commit": code.commit, "note": code.note},
        "libraries_changed": changed_libraries(recipe, libraries()),
        METADATA_KEY: recipe.metadata(),
    }


def message(result: dict[str, Any], files: int) -> str:
    """What a person needs to know when the bytes are not the same."""
    differences = result["differences"]
    lines = [f"{result['version']} did not come out the same: {len(differences)} of {files} files"]
    lines += [f"  - {line}" for line in differences[:_SHOWN]]
    if len(differences) > _SHOWN:
        lines.append(f"  - and {len(differences) - _SHOWN} more, in reproduction.json of the run")
    return "\n".join([*lines, *notes(result)])


def notes(result: dict[str, Any]) -> list[str]:
    """What was not as it was then."""
    changed = result["libraries_changed"]
    said = [f"Code: {result['code']['note']}"] if result["code"]["note"] else []
    return said + ([f"Other versions of libraries: {', '.join(changed)}"] if changed else [])


STEP = Step(
    name="reproduce",
    summary="making the version again",
    parameters=("version", "registered_model"),
    inputs=inputs,
    settings=settings,
    work=work,
    always=True,
)
