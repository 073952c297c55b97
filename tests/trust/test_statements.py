"""What is signed and written about a version, in the formats that other tools read."""

from __future__ import annotations

import json
from pathlib import Path

import cyclonedx.schema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft7Validator
from referencing import Registry, Resource

from phi3_mlflow.config.loading import load_profile, profile_names
from phi3_mlflow.stages.card import front_matter, model_card
from phi3_mlflow.stages.evaluate import write_materials
from phi3_mlflow.tracking.registry import VersionName
from phi3_mlflow.trust import provenance as statements
from phi3_mlflow.trust.attestations import PROVENANCE, place_of, sign_version
from phi3_mlflow.trust.bom import BOM_NAME, Described, bom, bom_text, with_figures
from phi3_mlflow.trust.bundles import open_bundle
from phi3_mlflow.trust.keys import trusted
from tests.trust.conftest import Keys, Line

SCHEMAS = Path(cyclonedx.schema.__file__).parent / "_res"
TAGS = {
    "flavor": "onnx",
    "precision": "int4",
    "algorithm": "gptq",
    "source": f"hf:owner/model@{'5' * 40}",
    "source_revision": "5" * 40,
    "artifact_sha256": "a" * 64,
    "git_commit": "8" * 40,
}
RECIPE = {
    "profile": {"source": TAGS["source"], "sha256": {"model.safetensors": "1" * 64}},
    "calibration_sha256": "2" * 64,
    "libraries": {"onnx": "1.23.2", "onnxruntime_genai": "0.18.0"},
    "rows": {
        "data": {"sha256": "3" * 64, "files": {"a.jsonl": "4" * 64}, "place": "/home/me/rows"},
        "validation": {"sha256": "5" * 64, "files": {}, "place": None},
    },
}


@pytest.fixture(scope="module")
def schema() -> Draft7Validator:
    names = ("bom-1.6", "spdx", "jsf-0.82")
    files = [f"{name}.SNAPSHOT.schema.json" for name in names]  # as they name one another
    found = {file: json.loads((SCHEMAS / file).read_text()) for file in files}
    registry = Registry().with_resources(
        (f"http://cyclonedx.org/schema/{file}", Resource.from_contents(content))
        for file, content in found.items()
    )
    return Draft7Validator(found[files[0]], registry=registry)


def described(**changes: object) -> Described:
    content = {
        "name": "tiny",
        "description": "A model.",
        "base_model": "owner/model",
        "licence": "MIT",
        "training_data": "not stated",
        "tags": TAGS,
        "recipe": RECIPE,
        "requirements": ["onnxruntime-genai==0.18.0", "numpy==2.2.6"],
        **changes,
    }
    return Described(**content)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"recipe": None, "requirements": []},
        {"licence": "a licence of our own"},
        {"licence": "Apache-2.0"},
        {"tags": {**TAGS, "adapter_sha256": "6" * 64}},
        {"recipe": {**RECIPE, "profile": {"source": "file:/some/where"}}},
    ],
)
def test_the_bill_of_materials_keeps_to_the_schema(changes: dict, schema: Draft7Validator) -> None:
    made = bom(described(**changes))
    assert not [error.message for error in schema.iter_errors(made)]
    references = {made["metadata"]["component"]["bom-ref"]}
    for component in made["components"]:
        references |= {component["bom-ref"]}
        references |= {inner["bom-ref"] for inner in component.get("components", ())}
    (dependency,) = made["dependencies"]
    assert {dependency["ref"], *dependency["dependsOn"]} <= references


def test_figures_make_it_the_next_version_of_the_same(schema: Draft7Validator) -> None:
    before = bom(described())
    after = json.loads(with_figures(json.dumps(before), {"kl_mean": 0.0123456789, "accuracy": 0.5}))
    assert not list(schema.iter_errors(after))
    assert after["serialNumber"] == before["serialNumber"]
    assert (before["version"], after["version"]) == (1, 2)
    analysis = after["metadata"]["component"]["modelCard"]["quantitativeAnalysis"]
    assert analysis["performanceMetrics"] == [
        {"type": "accuracy", "value": "0.5"},
        {"type": "kl_mean", "value": "0.0123457"},
    ]
    for text in ("", "{", "[]", '{"metadata": 1}'):
        assert with_figures(text, {}) is None


def test_the_bill_with_figures_lies_beside_the_report(
    line: Line, name: str, tmp_path: Path
) -> None:
    version = line.version(name, **{BOM_NAME: bom_text(described()).encode()})
    (report := tmp_path / "report").mkdir()
    write_materials(version, {"kl_mean": 0.1}, report)
    assert json.loads((report / BOM_NAME).read_text())["version"] == 2
    (other := tmp_path / "other").mkdir()
    write_materials(line.version(name), {"kl_mean": 0.1}, other)
    assert not list(other.iterdir())


@given(licence=st.text(min_size=1), text=st.text(), name=st.text(min_size=1))
def test_any_words_keep_to_the_schema(
    licence: str, text: str, name: str, schema: Draft7Validator
) -> None:
    made = bom(described(licence=licence, description=text, base_model=name))
    assert not list(schema.iter_errors(made))


def test_the_bill_of_materials_says_what_went_in() -> None:
    made = bom(described())
    by_ref = {component["bom-ref"]: component for component in made["components"]}
    assert by_ref["base-model"]["purl"] == f"pkg:huggingface/owner/model@{'5' * 40}"
    assert by_ref["base-model"]["components"][0]["hashes"][0]["content"] == "1" * 64
    assert by_ref["rows-data"]["hashes"][0]["content"] == "3" * 64
    assert by_ref["pkg:pypi/onnxruntime-genai@0.18.0"]["scope"] == "required"
    assert by_ref["pkg:pypi/onnx@1.23.2"]["scope"] == "excluded"
    assert "/home/me" not in json.dumps(made), "where rows lie is the user's business"
    assert bom_text(described()) == bom_text(described()), "the same model, other bytes"


def test_provenance_is_slsa_and_names_what_went_in(line: Line, keys: Keys, name: str) -> None:
    version = line.version(name)
    sign_version(version, keys.signs, "run-1")
    file = line.place(version) / place_of(version) / PROVENANCE
    statement = open_bundle(file, trusted((str(keys.public),)), statements.SLSA).statement
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["predicateType"] == "https://slsa.dev/provenance/v1"
    predicate = statement["predicate"]
    definition, details = predicate["buildDefinition"], predicate["runDetails"]
    assert definition["buildType"].startswith("urn:")
    assert details["builder"]["id"] == statements.BUILDER
    assert details["metadata"]["invocationId"] == "run-1"
    needed = {one["name"]: one for one in definition["resolvedDependencies"]}
    assert needed["source"]["digest"] == {"gitCommit": "5" * 40}
    assert needed["source"]["uri"].startswith("pkg:huggingface/a/b@")
    assert needed["source/config.json"]["digest"] == {"sha256": "6" * 64}
    assert needed["phi3-mlflow"]["digest"] == {"gitCommit": "8" * 40}
    assert needed["calibration"]["digest"] == {"sha256": "7" * 64}
    names = {one["name"] for one in statement["subject"]}
    assert {"MLmodel", "manifest.json", "artifacts/onnx/model.onnx.data"} <= names


def test_rows_are_named_by_their_hashes_and_not_by_their_place() -> None:
    made = statements.Made(VersionName("m", "1"), TAGS, {"a": "0" * 64}, RECIPE, None)
    text = json.dumps(statements.provenance(made))
    assert "rows/data/a.jsonl" in text
    assert "4" * 64 in text
    assert "/home/me" not in text


def test_code_with_changes_of_its_own_is_not_given_out_for_a_commit() -> None:
    tags = {**TAGS, "git_commit": f"{'8' * 40}-dirty"}
    made = statements.Made(VersionName("m", "1"), tags, {}, RECIPE, None)
    (code,) = (
        one
        for one in statements.provenance(made)["predicate"]["buildDefinition"][
            "resolvedDependencies"
        ]
        if one["name"] == "phi3-mlflow"
    )
    assert "digest" not in code
    assert code["annotations"]["commit"].endswith("-dirty")


@pytest.mark.parametrize("name", profile_names())
def test_the_front_matter_is_what_the_hub_reads(name: str) -> None:
    from huggingface_hub import ModelCard

    profile = load_profile(name)
    text = front_matter(profile, TAGS) + model_card(profile, TAGS)
    card = ModelCard(text)
    assert card.data.license == profile.licence.lower()
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.base_model == profile.base_model
    assert card.data.library_name == "onnx"
    assert "mlflow" in card.data.tags
    assert card.text.lstrip().startswith(profile.base_model)
    head = yaml.safe_load(text.split("---")[1])
    assert head["base_model_relation"] == "quantized"


def test_the_front_matter_of_what_the_hub_does_not_know(tmp_path: Path) -> None:
    profile = load_profile("smollm2-135m").model_copy(
        update={"licence": "Our Own: Licence", "base_model": "none of the hub's"}
    )
    head = yaml.safe_load(front_matter(profile, {**TAGS, "flavor": "transformers"}).split("---")[1])
    assert head["license"] == "other"
    assert head["license_name"] == "Our Own: Licence"
    assert "base_model" not in head
    assert head["library_name"] == "transformers"
