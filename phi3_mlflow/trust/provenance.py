"""What is signed about a version beside its files: how it was made, and what the gate said.

Both are in-toto statements: SLSA provenance, version 1, and a test result, version 0.1. They name
the version, so that neither can stand for another one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import phi3_mlflow
from phi3_mlflow.artifacts.provenance import TRAINING_TAGS
from phi3_mlflow.tracking.registry import CONTENT, NOT_GATED, PASSED, VERSION_TAGS
from phi3_mlflow.tracking.stored_files import LOGGED
from phi3_mlflow.trust.bom import package_url
from phi3_mlflow.trust.signing import statement

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from phi3_mlflow.tracking.registry import VersionName

SLSA = "https://slsa.dev/provenance/v1"
TEST_RESULT = "https://in-toto.io/attestation/test-result/v0.1"
BUILD_TYPE = "urn:phi3-mlflow:pipeline:1"
"""What the parameters of the provenance mean: docs/trust.md."""
BUILDER = "urn:phi3-mlflow:builder:own-machine"
"""The pipeline, run by whoever has the key, on a machine that nobody else vouches for."""
REGISTERED = "phi3mlflow_registered"
"""The field with the version's name, its number and the tags that say what it is."""
_NAMED = (*VERSION_TAGS, *TRAINING_TAGS, CONTENT, LOGGED, "profile")
_VERDICT = ("gate", "gate_decision", "gate_against", "gate_reasons", "evaluation_run")
_TEXTS = "evaluation_texts"
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Made:
    """What is known of a version when it is signed.

    Attributes:
        version: which one.
        tags: all that the registry has.
        files: sha256 by path.
        recipe: from the model's metadata; None of a model that carries none.
        run_id: the MLflow run that registers it.
    """

    version: VersionName
    tags: Mapping[str, str]
    files: Mapping[str, str]
    recipe: Mapping[str, Any] | None
    run_id: str | None


def named_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """The tags of a version that say what it is, and do not change after it was registered."""
    return {key: tags[key] for key in _NAMED if key in tags}


def verdict_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """The tags of a version that say what the gate decided; empty before it was asked."""
    return {key: tags[key] for key in _VERDICT if key in tags} if "gate" in tags else {}


def provenance(made: Made) -> dict[str, Any]:
    """The statement on how a version was made: SLSA provenance of build level 1."""
    recipe = made.recipe or {}
    now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    metadata = {"finishedOn": now, **({"invocationId": made.run_id} if made.run_id else {})}
    predicate = {
        "buildDefinition": {
            "buildType": BUILD_TYPE,
            "externalParameters": {"profile": recipe.get("profile") or {}},
            "internalParameters": {"libraries": recipe.get("libraries") or {}},
            "resolvedDependencies": list(_dependencies(made.tags, recipe)),
        },
        "runDetails": {
            "builder": {"id": BUILDER, "version": {"phi3-mlflow": phi3_mlflow.__version__}},
            "metadata": metadata,
        },
        REGISTERED: _registered(made.version, named_tags(made.tags)),
    }
    subject = [
        {"name": path, "digest": {"sha256": made.files[path]}} for path in sorted(made.files)
    ]
    return statement(subject, SLSA, predicate)


def verdict(version: VersionName, tags: Mapping[str, str], root: str) -> dict[str, Any]:
    """The statement on what the gate decided.

    Args:
        version: that was measured.
        tags: of it.
        root: the digest over its files in the signature.
    """
    result = {PASSED: "PASSED", NOT_GATED: "WARNED"}.get(tags["gate"], "FAILED")
    texts = tags.get(_TEXTS)
    measured_on = [{"name": "held-out texts", "digest": {"sha256": texts}}] if texts else []
    predicate = {
        "result": result,
        "configuration": measured_on,
        REGISTERED: _registered(version, verdict_tags(tags)),
    }
    subject = [{"name": version.uri, "digest": {"sha256": root}}]
    return statement(subject, TEST_RESULT, predicate)


def _registered(version: VersionName, tags: Mapping[str, str]) -> dict[str, Any]:
    return {"name": version.name, "version": version.version, "tags": dict(tags)}


def _dependencies(tags: Mapping[str, str], recipe: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Everything that went in, with its hash where there is one."""
    profile = recipe.get("profile") or {}
    uri = package_url(str(profile.get("source") or tags.get("source", "unknown")))
    commit = tags.get("source_revision", "")
    pinned = {"digest": {"gitCommit": commit}} if _COMMIT.fullmatch(commit) else {}
    yield {"name": "source", "uri": uri, **pinned}
    for name, sha256 in sorted((profile.get("sha256") or {}).items()):
        yield {"name": f"source/{name}", "uri": uri, "digest": {"sha256": sha256}}
    code = tags.get("git_commit", "unknown")
    exact = {"digest": {"gitCommit": code}} if _COMMIT.fullmatch(code) else {}
    yield {"name": "phi3-mlflow", "annotations": {"commit": code}, **exact}
    if recipe.get("calibration_sha256"):
        yield {"name": "calibration", "digest": {"sha256": recipe["calibration_sha256"]}}
    for key, rows in sorted((recipe.get("rows") or {}).items()):
        files = rows.get("files") or {"": rows["sha256"]}
        for name, sha256 in sorted(files.items()):
            yield {"name": f"rows/{key}/{name}".rstrip("/"), "digest": {"sha256": sha256}}
