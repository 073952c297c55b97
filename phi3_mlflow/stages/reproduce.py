"""Make a registered version again from its recipe, and say whether the bytes are the same.

    mlflow run . --env-manager local -e reproduce -P profile=smollm2-135m -P version=1
    python -m steps.reproduce --version models:/smollm2-135m@champion

Everything is done anew in a cache of its own: the source is fetched at the recorded revision, and
the steps run with the code of the version's commit and the settings it was made with. The rows
that a version was fine-tuned on are looked for where they were, or where `data` says; only those
with the recorded hash are taken. Ends with code 0 when every file is the same, with code 4 when
one differs. Registers nothing.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from phi3_mlflow.artifacts.inputs import Input
from phi3_mlflow.core import console
from phi3_mlflow.core.errors import NotReproduced, UserError
from phi3_mlflow.core.git import UNKNOWN, origin
from phi3_mlflow.core.shipped import checkout
from phi3_mlflow.pipeline.recipe import Recipe, artifact_libraries
from phi3_mlflow.pipeline.reproduction import (
    Code,
    changed_libraries,
    code_at,
    rebuild,
    write_profile,
)
from phi3_mlflow.pipeline.step import Settings, Step, Work, step_parameters
from phi3_mlflow.stages.records import ReproductionRecord
from phi3_mlflow.tracking import registry
from phi3_mlflow.tracking.connection import tracking_identity
from phi3_mlflow.tracking.runs import close_child, open_child

if TYPE_CHECKING:
    from phi3_mlflow.artifacts.cache import StepCache
    from phi3_mlflow.artifacts.manifests import Manifest
    from phi3_mlflow.config.parameters import Request
    from phi3_mlflow.tracking.registry import VersionName

_SHOWN = 5  # differing files


@dataclass(frozen=True)
class ReproduceInputs:
    """A version."""

    version: Input[VersionName]


class Reproduce(Step[ReproduceInputs, ReproductionRecord]):
    """Version to the same bytes again, or a list of what differs."""

    name = "reproduce"
    doing = "making the version again"
    parameters = step_parameters("version", "data", "registered_model")
    record_type = ReproductionRecord
    in_mlflow = True
    cached = False

    def inputs(self, request: Request, cache: StepCache) -> ReproduceInputs:
        version = registry.find_version(request.value("version"), request.profile.registered_model)
        return ReproduceInputs(
            Input(version, f"{version.uri}#{registry.content(version)}", version.uri)
        )

    def settings(self, request: Request) -> Settings:
        return {
            "registered_model": request.profile.registered_model,
            "tracking": tracking_identity(),
        }

    def work(self, work: Work[ReproduceInputs]) -> None:
        import mlflow

        version = work.inputs.version.value
        tags = registry.describe(version).tags
        recipe = Recipe.read(mlflow.models.get_model_info(version.uri).metadata, version.uri)
        registered = tags.get("artifact_sha256", "")
        if recipe.files.digest != registered:
            raise UserError(
                f"{version.uri}: its tag artifact_sha256 ({registered}) is not the digest of the "
                f"files in its recipe ({recipe.files.digest}): one of the two was changed after it "
                "was made"
            )
        private = work.out / "again"
        private.mkdir()
        try:
            code = code_at(tags.get("git_commit", UNKNOWN), checkout(), origin(), private / "code")
            console.say(f"  {version.uri}, with the code of {code.commit}")
            data = None if work.request.is_auto("data") else Path(work.request.value("data"))
            profile = write_profile(recipe, code, private, data)
            made = rebuild(
                tags.get("flavor", "onnx"),
                profile, code, private / "cache", open_child, close_child,
            )  # fmt: skip
        finally:
            shutil.rmtree(private, ignore_errors=True)
        result = compared(version, recipe, code, made)
        result.write(work.out)
        work.metrics["reproduced"] = float(result.same)
        mlflow.log_metric("reproduced", float(result.same))
        mlflow.log_dict(result.model_dump(mode="json"), "reproduction.json")
        mlflow.set_tags({"version": version.uri, "reproduced": str(result.same).lower()})
        if not result.same:
            raise NotReproduced(message(result, len(recipe.files.files)))
        console.say(f"  the same: {len(recipe.files.files)} files, artifact_sha256 {registered}")
        for note in notes(result):
            console.say(f"  {note}")


def compared(
    version: VersionName, recipe: Recipe, code: Code, made: Manifest
) -> ReproductionRecord:
    """What came out."""
    now = artifact_libraries(trained=bool(recipe.rows))
    return ReproductionRecord(
        version=version.uri,
        same=made.digest == recipe.files.digest,
        artifact_sha256={"registered": recipe.files.digest, "made_again": made.digest},
        differences=tuple(recipe.files.changes(made)),
        code={"commit": code.commit, "note": code.note},
        libraries_changed=tuple(changed_libraries(recipe, now)),
        recipe=recipe.metadata(),
    )


def message(result: ReproductionRecord, files: int) -> str:
    """What a person needs to know when the bytes are not the same."""
    differences = result.differences
    lines = [f"{result.version} did not come out the same: {len(differences)} of {files} files"]
    lines += [f"  - {line}" for line in differences[:_SHOWN]]
    if len(differences) > _SHOWN:
        lines.append(f"  - and {len(differences) - _SHOWN} more, in reproduction.json of the run")
    return "\n".join([*lines, *notes(result)])


def notes(result: ReproductionRecord) -> list[str]:
    """What was not as it was then."""
    changed = result.libraries_changed
    said = [f"Code: {result.code['note']}"] if result.code["note"] else []
    return said + ([f"Other versions of libraries: {', '.join(changed)}"] if changed else [])


STEP = Reproduce()
