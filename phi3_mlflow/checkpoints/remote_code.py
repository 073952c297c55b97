"""References to code in a checkpoint's configuration: found, refused, or taken out on request.

A configuration can name Python files of its repository (`auto_map`, `custom_pipelines`) or kernels
of another (`attn_implementation: owner/name`) that transformers would download and run. Phi-3 is
part of transformers, so no checkpoint of it needs any.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from phi3_mlflow.core.errors import CheckpointRefused, problem_list

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

CONFIGURATIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
)
_KEYS = frozenset({"auto_map", "custom_pipelines", "custom_generate", "trust_remote_code"})


def references_to_code(content: Any, where: str = "") -> list[str]:
    """The keys of a configuration that lead to code, as `auto_map` or `text_config.auto_map`."""
    found: list[str] = []
    if isinstance(content, dict):
        for key, value in content.items():
            place = f"{where}.{key}" if where else str(key)
            if _leads_to_code(str(key), value):
                found.append(place)
            else:
                found += references_to_code(value, place)
    elif isinstance(content, list):
        for position, value in enumerate(content):
            found += references_to_code(value, f"{where}[{position}]")
    return found


def _leads_to_code(key: str, value: Any) -> bool:
    if key in _KEYS:
        return value not in (None, False, {}, [])
    # "sdpa" is built in; "owner/name" is a kernel repository on the hub.
    return key.endswith("_implementation") and "/" in json.dumps(value)


def refuse_remote_code(configurations: Mapping[str, Any]) -> None:
    """Raise CheckpointRefused when any configuration, by file name, leads to code."""
    problems = remote_code_problems(configurations)
    if problems:
        raise CheckpointRefused(
            problem_list(
                "the checkpoint brings code of its own, which is never run",
                problems,
                "Phi-3 needs none. Use a checkpoint without it, or put `remote_code: drop` into "
                "the profile: the references are then taken out and the code is not downloaded.",
            )
        )


def remote_code_problems(configurations: Mapping[str, Any]) -> list[str]:
    """One line per reference to code."""
    return [
        f"{file}: {place}"
        for file, content in configurations.items()
        for place in references_to_code(content)
    ]


def drop_remote_code(directory: Path) -> dict[str, list[str]]:
    """Take references to code out of the configurations of a checkpoint.

    Args:
        directory: the checkpoint; files that hold none stay as they are, byte for byte.

    Returns:
        What was taken out, by file name.
    """
    changed: dict[str, list[str]] = {}
    for name in CONFIGURATIONS:
        file = directory / name
        if not file.is_file():
            continue
        content = json.loads(file.read_text("utf-8"))
        if found := references_to_code(content):
            file.write_text(
                json.dumps(_without(content), indent=2, ensure_ascii=False) + "\n", "utf-8"
            )
            changed[name] = found
    return changed


def _without(content: Any) -> Any:
    if isinstance(content, dict):
        return {k: _without(v) for k, v in content.items() if not _leads_to_code(k, v)}
    if isinstance(content, list):
        return [_without(value) for value in content]
    return content
