"""The recipe of a logged model: what has to be done again to make the same bytes.

It travels in the model's own metadata (the file MLmodel), so that it is there wherever the
version is: the profile as it was resolved, with the source's files pinned by their hashes, the
files of the artifact, and the versions of the libraries. Of the rows that a version was fine-tuned
on it has the hashes, and where they were; the rows themselves stay the user's.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_mlflow.artifacts.code_keys import closure, library_versions
from phi3_mlflow.artifacts.manifests import FileEntry, Manifest
from phi3_mlflow.artifacts.provenance import content_manifest, read_provenance
from phi3_mlflow.config.loading import CALIBRATION
from phi3_mlflow.core.errors import UserError
from phi3_mlflow.core.shipped import project_path
from phi3_mlflow.sources.spec import FileSource, HubSource, parse_source
from phi3_mlflow.training.settings import ROWS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from phi3_mlflow.config.profile import Profile

METADATA_KEY = "recipe"
MADE_BY = ("fetch", "quantize", "export")
"""The steps that make an artifact, from its source on, where nothing is trained."""
# What says how a model is judged, who signs it, how large it is, or how long a download may take,
# and decides no byte of it; and the search for a quantization, whose outcome stands in the
# provenance.
_DECIDES_NOTHING = {
    "architecture",
    "evaluation",
    "gate",
    "search",
    "time_limit_s",
    "registered_model",
    "trust",
}


@dataclass(frozen=True)
class Rows:
    """Rows that a version was trained on, or validated with.

    Attributes:
        sha256: of the file, of a saved dataset, or over all files.
        files: sha256 by name, where they were several.
        place: where they were; with `project_path`, where that was in the project.
    """

    sha256: str
    files: Mapping[str, str]
    place: str | None


@dataclass(frozen=True)
class Recipe:
    """How an artifact was made.

    Attributes:
        profile: the content of a profile's file that makes it again.
        calibration_sha256: of the calibration texts, where there were any.
        files: the artifact's, without `provenance.json`.
        libraries: distribution to version.
        rows: what the version was fine-tuned with, by the key in the section `train`.
    """

    profile: Mapping[str, Any]
    calibration_sha256: str | None
    files: Manifest
    libraries: Mapping[str, str]
    rows: Mapping[str, Rows] = field(default_factory=dict)

    def metadata(self) -> dict[str, Any]:
        """As plain values, for a model's metadata."""
        rows = {"rows": {key: asdict(rows) for key, rows in self.rows.items()}}
        return {
            "profile": dict(self.profile),
            "calibration_sha256": self.calibration_sha256,
            "files": [asdict(entry) for entry in self.files.files],
            "libraries": dict(self.libraries),
            **(rows if self.rows else {}),
        }

    @classmethod
    def read(cls, metadata: Mapping[str, Any] | None, uri: str) -> Recipe:
        """The recipe in a model's metadata.

        Raises:
            UserError: it holds none, or one that cannot be read.
        """
        content = (metadata or {}).get(METADATA_KEY)
        if content is None:
            raise UserError(
                f"{uri} carries no recipe: it was not logged by this project, was logged before "
                "recipes were recorded, was made from a folder whose origin is not known, or "
                "was fine-tuned before recipes covered that"
            )
        try:
            files = tuple(FileEntry(f["path"], f["size"], f["sha256"]) for f in content["files"])
            return cls(
                content["profile"],
                content["calibration_sha256"],
                Manifest(files),
                content["libraries"],
                {key: Rows(**rows) for key, rows in content.get("rows", {}).items()},
            )
        except (KeyError, TypeError) as error:
            raise UserError(f"{uri}: its recipe cannot be read: {error!r}") from error


def artifact_libraries(*, trained: bool = False) -> dict[str, str]:
    """The libraries that decide the bytes of an artifact, with their versions here."""
    steps = (*MADE_BY, "train") if trained else MADE_BY
    return library_versions(closure((f"phi3_mlflow.stages.{step}",)) for step in steps)


def recipe_of(profile: Profile, directory: Path, base_dir: Path) -> Recipe | None:
    """The recipe of an artifact that is about to be logged.

    Where the artifact's provenance and the profile differ, the provenance counts: the steps before
    may have been run with other parameters.

    Args:
        profile: that it is logged with.
        directory: the artifact, with its provenance.
        base_dir: what a relative `file:` source counts from.

    Returns:
        None when the provenance does not say where the artifact came from, or how it was trained.
    """
    known = read_provenance(directory)
    if not {"source", "source_revision", "lock"} <= known.keys():
        return None
    training = known.get("training")
    if "adapter_sha256" in known and training is None:
        return None
    content = profile.model_dump(mode="json", exclude=_DECIDES_NOTHING, exclude_none=True)
    content.pop("track", None)
    content.pop("train", None)
    rows = _rows(profile, training) if training else {}
    if training:
        # What measured it then is not part of the recipe, so it cannot be refused for that again.
        content["train"] = {**training["settings"], "allow_overlap": True}
    content["source"] = _pinned(known["source"], known["source_revision"], base_dir)
    content["sha256"] = known["lock"]
    content["precision"] = known.get("precision", content["precision"])
    quantization = {k: v for k, v in known.get("quantization", {}).items() if v is not None}
    sha256 = quantization.pop("calibration", None)
    if quantization:
        used = profile.quantization.calibration
        # The project's own texts are those of the commit that is run.
        if sha256 is not None and used is not None and used != CALIBRATION:
            quantization["calibration"] = str(used)
        content["quantization"] = quantization
    else:
        content["quantization"].pop("calibration", None)
    libraries = artifact_libraries(trained=bool(rows))
    return Recipe(content, sha256, content_manifest(directory), libraries, rows)


def _rows(profile: Profile, training: Mapping[str, Any]) -> dict[str, Rows]:
    """The rows that a checkpoint was trained with, and where the profile finds them."""
    found = {}
    for key in ROWS:
        if known := training["rows"].get(key):
            named = getattr(profile.train, key, None)
            place = named  # a URI
            if isinstance(named, Path):
                place = project_path(named) or str(named.absolute())
            found[key] = Rows(known["sha256"], known["files"], place)
    return found


def _pinned(source: str, revision: str, base_dir: Path) -> str:
    spec = parse_source(source)
    if isinstance(spec, HubSource):
        return f"hf:{spec.repo}@{revision}"
    if isinstance(spec, FileSource):
        return f"file:{spec.directory(base_dir).absolute()}"
    return source
