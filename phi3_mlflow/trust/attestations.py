"""Bundles of a version: where they lie, and how they get there.

They are artifacts of the logged model, in a folder of their own beside its files, one per version:
`attestations/NAME-NUMBER/`. So they come along wherever the model is downloaded to, and the folder
is what a signature leaves out. The version's tags `attestations` and `signed_by` say where and by
whom, for people; whoever checks believes neither.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from phi3_mlflow.core.errors import EnvironmentProblem, UserError
from phi3_mlflow.tracking import registry
from phi3_mlflow.tracking.stored_files import temporary_downloads, whole_files
from phi3_mlflow.trust import provenance as statements
from phi3_mlflow.trust.files import ATTESTATIONS, ModelFiles
from phi3_mlflow.trust.signing import signing_key

if TYPE_CHECKING:
    from collections.abc import Mapping

    from phi3_mlflow.tracking.registry import VersionName
    from phi3_mlflow.trust.settings import SignWith
    from phi3_mlflow.trust.signing import SigningKey

SIGNATURE = "model.sigstore.json"
PROVENANCE = "provenance.sigstore.json"
VERDICT = "verdict.sigstore.json"
WHERE_TAG = "attestations"
BY_TAG = "signed_by"
VERDICT_TAG = "signed_verdict"
"""What the verdict was when it was signed, as a hash: the same is not signed again."""


def place_of(version: VersionName) -> str:
    """The folder of a version's bundles within the model's."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", version.name)
    if plain != version.name:  # two names may look alike without their odd characters
        plain += "-" + hashlib.sha256(version.name.encode()).hexdigest()[:8]
    return f"{ATTESTATIONS}/{plain}-{version.version}"


def sign_version(version: VersionName, settings: SignWith, run_id: str | None) -> bool:
    """Sign a version's files and its provenance, unless this key has done so.

    Args:
        version: as it was registered.
        settings: what to sign with.
        run_id: of the MLflow run that registers it.

    Returns:
        Whether it was signed now.

    Raises:
        UserError: the key is not there, or the folder holds what cannot be signed.
        EnvironmentProblem: the model is damaged, or a token or network gives out.
    """
    with signing_key(settings) as key:
        tags = dict(registry.describe(version).tags)
        if tags.get(BY_TAG) == key.fingerprint and tags.get(WHERE_TAG) == place_of(version):
            return False
        with temporary_downloads(), tempfile.TemporaryDirectory() as temporary:
            folder = whole_files(version.uri)
            files = ModelFiles.read(folder)
            _refuse_odd(version, folder, files)
            made = statements.Made(version, tags, files.hashes, recipe_in(folder), run_id)
            key.sign_folder(folder, Path(temporary, SIGNATURE))
            key.sign_statement(statements.provenance(made), Path(temporary, PROVENANCE))
            _log(version, Path(temporary))
    registry.set_tags(version, {WHERE_TAG: place_of(version), BY_TAG: key.fingerprint})
    return True


def sign_verdict(version: VersionName, settings: SignWith) -> bool:
    """Sign what the gate has said of a version, unless this key has done so.

    Returns:
        Whether it was signed now.

    Raises:
        UserError: the version has no verdict, or the key is not there.
        EnvironmentProblem: the model is damaged, or a token or network gives out.
    """
    tags = dict(registry.describe(version).tags)
    if "gate" not in tags:
        raise UserError(f"{version.uri} has not been evaluated, so there is no verdict to sign")
    with signing_key(settings) as key:
        state = _state(statements.verdict_tags(tags), key)
        if tags.get(VERDICT_TAG) == state:
            return False
        with temporary_downloads(), tempfile.TemporaryDirectory() as temporary:
            files = ModelFiles.read(whole_files(version.uri))
            signed = statements.verdict(version, tags, files.root)
            key.sign_statement(signed, Path(temporary, VERDICT))
            _log(version, Path(temporary))
    registry.set_tags(version, {VERDICT_TAG: state})
    return True


def _state(verdict: Mapping[str, str], key: SigningKey) -> str:
    text = "\0".join(f"{name}={value}" for name, value in sorted(verdict.items()))
    return hashlib.sha256(f"{key.fingerprint}\0{text}".encode()).hexdigest()


def _refuse_odd(version: VersionName, folder: Path, files: ModelFiles) -> None:
    """A signature over what is not the model's would make it look as if it were."""
    bytecode = [path for path in files.hashes if "__pycache__" in path.split("/")]
    problems = [*files.odd, *(f"{path} is byte code" for path in bytecode)]
    if problems:
        raise UserError(
            f"{version.uri} is not signed: {'; '.join(problems[:3])}. A model is logged without; "
            f"whoever loaded it from its store has left that there. Remove it from {folder} (the "
            "folders __pycache__), and run register again"
        )


def _log(version: VersionName, folder: Path) -> None:
    model_id = registry.logged_model_id(version)
    if model_id is None:
        raise UserError(
            f"{version.uri} is no logged model of MLflow 3, so there is no place for its signature"
        )
    try:
        registry.client().log_model_artifacts(model_id, str(folder), place_of(version))
    except Exception as error:  # the clients of stores raise whatever they like
        raise EnvironmentProblem(
            f"the signature of {version.uri} cannot be stored: {str(error)[:300]}"
        ) from error


def recipe_in(folder: Path) -> Mapping[str, Any] | None:
    """The recipe in a model's MLmodel file, as plain values; nothing of the model is loaded."""
    try:
        content = yaml.safe_load((folder / "MLmodel").read_text("utf-8"))
        recipe = (content.get("metadata") or {}).get("recipe")
    except (OSError, ValueError, AttributeError, yaml.YAMLError, RecursionError):
        return None
    return recipe if isinstance(recipe, dict) else None
