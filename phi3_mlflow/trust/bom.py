"""What a model consists of, as a bill of materials (ML-BOM) in CycloneDX 1.6.

It lies with the model as `bom.cdx.json`, and is signed with its files. Nothing in it differs
between two models of the same content: no time, no random number.
"""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import phi3_mlflow

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

BOM_NAME = "bom.cdx.json"
_NAMESPACE = uuid.UUID("6f6b3c0e-2c33-5d0e-9d53-6b3a4d3f1c16")
# Licences by the identifiers that the schema knows; anything else is a name to it.
_SPDX = re.compile(r"MIT|Apache-2\.0|BSD-[23]-Clause|CC-BY(-SA|-NC)?-4\.0|CC0-1\.0|GPL-3\.0-only")
_LIMITS = "Answers can be wrong and must be checked where that matters."
_USE = "chat and instruction following through MLflow's chat request"


@dataclass(frozen=True)
class Described:
    """What a bill of materials says of a model.

    Attributes:
        name: the registered model's.
        description: in a sentence or two.
        base_model: the name where it was published.
        licence: of it.
        training_data: the publisher's statement.
        tags: the version's.
        recipe: how it is made again; None where that is not known.
        requirements: what it takes to load it, `NAME==VERSION`.
    """

    name: str
    description: str
    base_model: str
    licence: str
    training_data: str
    tags: Mapping[str, str]
    recipe: Mapping[str, Any] | None
    requirements: Sequence[str]


def bom_text(model: Described) -> str:
    """The bill of materials as JSON."""
    return json.dumps(bom(model), indent=2, ensure_ascii=False) + "\n"


def bom(model: Described) -> dict[str, Any]:
    """The bill of materials."""
    digest = model.tags.get("artifact_sha256", "unknown")
    libraries = list(_libraries(model))
    reference = f"model:{model.name}@{digest}"
    told = json.dumps(sorted(model.tags.items()))
    tool = {"type": "application", "name": "phi3-mlflow", "version": phi3_mlflow.__version__}
    base = {
        "type": "machine-learning-model",
        "bom-ref": "base-model",
        "name": model.base_model,
        "licenses": _licences(model.licence),
        **_source(model),
    }
    data = list(_data(model))
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, f'{reference}{told}')}",
        "version": 1,
        "metadata": {
            "tools": {"components": [tool]},
            "component": {
                "type": "machine-learning-model",
                "bom-ref": reference,
                "name": model.name,
                "version": digest[:12],
                "description": model.description,
                "licenses": _licences(model.licence),
                "pedigree": {"ancestors": [{"type": base["type"], "name": model.base_model}]},
                "modelCard": _card(model, [each["bom-ref"] for each in data]),
                "properties": [
                    {"name": f"phi3-mlflow:{key}", "value": str(value)}
                    for key, value in sorted(model.tags.items())
                ],
            },
        },
        "components": [base, *data, *libraries],
        "dependencies": [
            {
                "ref": reference,
                "dependsOn": [each["bom-ref"] for each in (base, *data, *libraries)],
            }
        ],
    }


def _licences(licence: str) -> list[dict[str, Any]]:
    key = "id" if _SPDX.fullmatch(licence) else "name"
    return [{"license": {key: licence}}]


def _source(model: Described) -> dict[str, Any]:
    """Where the base model was taken from, and the hashes of its files."""
    profile = (model.recipe or {}).get("profile") or {}
    source = package_url(str(profile.get("source") or model.tags.get("source", "")))
    known: dict[str, Any] = {"purl": source} if source.startswith("pkg:") else {}
    files = [
        {
            "type": "file",
            "bom-ref": f"base-model/{name}",
            "name": name,
            "hashes": [{"alg": "SHA-256", "content": sha256}],
        }
        for name, sha256 in sorted((profile.get("sha256") or {}).items())
    ]
    return known | ({"components": files} if files else {})


def _data(model: Described) -> Iterator[dict[str, Any]]:
    """What it was calibrated and fine-tuned on: the rows stay the user's, their hashes are told."""
    recipe = model.recipe or {}
    if recipe.get("calibration_sha256"):
        yield _dataset("calibration", "calibration texts", recipe["calibration_sha256"])
    for key, rows in sorted((recipe.get("rows") or {}).items()):
        told = "rows it was fine-tuned on" if key == "data" else f"rows of train.{key}"
        yield _dataset(f"rows-{key}", told, rows["sha256"])


def _dataset(reference: str, told: str, sha256: str) -> dict[str, Any]:
    return {
        "type": "data",
        "bom-ref": reference,
        "name": reference,
        "description": told,
        "hashes": [{"alg": "SHA-256", "content": sha256}],
        "data": [{"type": "dataset", "name": reference, "description": told}],
    }


def _libraries(model: Described) -> Iterator[dict[str, Any]]:
    """What loads it, and what made it."""
    recipe = (model.recipe or {}).get("libraries") or {}
    made = {_plain(name): str(version) for name, version in recipe.items()}
    pins = (line.partition("==") for line in model.requirements)
    loads = {_plain(name): version for name, equal, version in pins if equal}
    for name, version in sorted({**made, **loads}.items()):
        yield {
            "type": "library",
            "bom-ref": f"pkg:pypi/{name}@{version}",
            "name": name,
            "version": version,
            "purl": f"pkg:pypi/{name}@{version}",
            "scope": "required" if name in loads else "excluded",
            "description": "loads the model" if name in loads else "made the model",
        }


def _plain(name: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _card(model: Described, data: Sequence[str]) -> dict[str, Any]:
    """The model card: parameters, figures, what it is for."""
    text = {"format": "text"}
    inline = {"type": "dataset", "name": "base model", "description": model.training_data}
    card: dict[str, Any] = {
        "modelParameters": {
            "task": "text-generation",
            "architectureFamily": "transformer",
            "modelArchitecture": "Phi-3 decoder",
            "datasets": [inline, *({"ref": reference} for reference in data)],
            "inputs": [text],
            "outputs": [text],
        },
        "considerations": {"useCases": [_USE], "technicalLimitations": [_LIMITS]},
    }
    if "adapter_sha256" in model.tags:
        card["modelParameters"]["approach"] = {"type": "supervised"}
    return card


def with_figures(text: str, figures: Mapping[str, float]) -> str | None:
    """A model's bill of materials with what was measured of it: the next version of the same.

    Args:
        text: as it lies with the model.
        figures: by name.

    Returns:
        None where the text is no bill of materials of this project.
    """
    try:
        made = json.loads(text)
        card = made["metadata"]["component"]["modelCard"]
        made["version"] = 2
        card["quantitativeAnalysis"] = {
            "performanceMetrics": [
                {"type": name, "value": f"{value:.6g}"} for name, value in sorted(figures.items())
            ]
        }
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return json.dumps(made, indent=2, ensure_ascii=False) + "\n"


def package_url(source: str) -> str:
    """A profile's source as a package URL, where there is such a kind; otherwise as it is."""
    if found := re.fullmatch(r"hf:([^@]+)@(.+)", source):
        return f"pkg:huggingface/{found[1]}@{found[2]}"
    if found := re.match(r"pypi:([A-Za-z0-9._-]+)==([^#]+)", source):
        return f"pkg:pypi/{found[1].lower()}@{found[2]}"
    return source
