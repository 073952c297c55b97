"""The keys of a profile as tables, from the models that check them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from _result import format_table

Row = tuple[str, str, str, str]


OUTSIDE = "outside"
"""What the keys that are in no section are asked for with."""


def profile_keys_table(section: str) -> str:
    """The keys of a section of a profile: their values, their defaults and what they mean.

    Raises:
        LookupError: a profile has no such section.
    """
    from phi3_mlflow.config.parameters import PARAMETERS
    from phi3_mlflow.config.profile import Profile
    from phi3_mlflow.quantization.settings import DEFAULT_ALGORITHM

    schema = Profile.model_json_schema()
    # What reading a profile fills in, and its models therefore need.
    filled_in = {
        "registered_model": "the profile's name",
        "quantization.algorithm": f"`{DEFAULT_ALGORITHM}`",
        "quantization.calibration": "data/calibration.jsonl",
    }
    helps = {p.profile_key: p.help for p in PARAMETERS.values() if p.profile_key}
    rows = [
        (f"`{key}`", values, filled_in.get(key, default), meaning or helps.get(key, ""))
        for key, values, default, meaning in keys(schema, schema.get("$defs", {}))
        if key != "name" and section_of(key) == section
    ]
    if not rows:
        raise LookupError(f"a profile has no section {section}")
    return format_table(["Key", "Values", "Default", "Meaning"], rows)


def section_of(key: str) -> str:
    """The section that a dotted key is in."""
    section, dot, _ = key.partition(".")
    return section if dot else OUTSIDE


def keys(schema: dict[str, Any], definitions: dict[str, Any], prefix: str = "") -> Iterator[Row]:
    """The rows of an object's schema, those of its sections included."""
    required = set(schema.get("required", ()))
    for name, given in schema.get("properties", {}).items():
        kinds = [resolved(kind, definitions) for kind in alternatives(given)]
        sections = [kind for kind in kinds if "properties" in kind]
        if not sections:
            default = "needed" if name in required else shown_default(given)
            values = " or ".join(dict.fromkeys(shown_kind(kind) for kind in kinds))
            yield f"{prefix}{name}", values, default, given.get("description", "")
            continue
        known: set[str] = set()
        for section in sections:
            for row in keys(section, definitions, f"{prefix}{name}."):
                if row[0] not in known:
                    known.add(row[0])
                    yield algorithm(row, kinds) if row[0].endswith(".algorithm") else row


def algorithm(row: Row, kinds: list[dict[str, Any]]) -> Row:
    """The key that tells the sections apart, with the values of all of them."""
    named = [kind["properties"]["algorithm"] for kind in kinds]
    meanings = [f"{each['const']}: {each.get('description', '')}" for each in named]
    return row[0], ", ".join(f"`{each['const']}`" for each in named), row[2], "; ".join(meanings)


def alternatives(given: dict[str, Any]) -> list[dict[str, Any]]:
    """What a value may be, without null: a key that is left out."""
    found = given.get("anyOf") or given.get("oneOf") or [given]
    return [kind for kind in found if kind.get("type") != "null"]


def resolved(kind: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """A schema in the place of its name."""
    reference = kind.get("$ref")
    return definitions[reference.rpartition("/")[2]] if reference else kind


def shown_kind(kind: dict[str, Any]) -> str:
    """One kind of value, in a few words."""
    if "enum" in kind or "const" in kind:
        return ", ".join(f"`{value}`" for value in kind.get("enum", [kind.get("const")]))
    names = {"integer": "whole number", "array": "list", "object": "mapping", "string": "text"}
    return names.get(kind.get("type", ""), kind.get("type", "any"))


def shown_default(given: dict[str, Any]) -> str:
    """A default as YAML has it."""
    default = given.get("default")
    if default is None or default in ("", [], {}):
        return "–"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"
