"""Which files make up a checkpoint: what is needed to load it, and its licence."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from phi3_mlflow.core.errors import CheckpointRefused

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"

_SMALL = {
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    INDEX,
}
_LICENCE = re.compile(r"(?i)(LICEN[CS]E|NOTICE|COPYING)([._-][A-Za-z0-9._-]*)?")
_CODE = (".py", ".pyc", ".so", ".dll", ".dylib", ".exe", ".sh")
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,149}")
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".msgpack", ".h5")
"""Endings of weight formats that are never loaded; several of them run code when they are."""

LARGEST_SMALL_FILE = 200_000_000
"""Bytes; what every file but the weights must stay under. The largest tokenizer.json has 35 MB."""


def is_small(name: str) -> bool:
    """Whether a file is one of those that are taken besides the weights."""
    return name in _SMALL or is_licence(name)


def is_licence(name: str) -> bool:
    """Whether a file name is that of a licence or a notice."""
    named = _LICENCE.fullmatch(name) is not None and not name.lower().endswith(_CODE)
    return named and is_plain(name)


def licence_files(directory: Path) -> list[Path]:
    """The licences and notices in a folder, the licences first."""
    found = (file for file in directory.iterdir() if file.is_file() and is_licence(file.name))
    return sorted(found, key=lambda file: (not file.name.upper().startswith("LICEN"), file.name))


def is_plain(name: object) -> bool:
    """Whether a name stays in its directory: no separators, no leading dot, plain characters."""
    return isinstance(name, str) and _PLAIN.fullmatch(name) is not None


def small_files(names: Iterable[str]) -> list[str]:
    """The configuration, tokenizer and licence files among the names of a source."""
    return sorted(name for name in names if is_small(name))


def weight_files(names: Iterable[str], index: bytes | None) -> list[str]:
    """The safetensors files to take, in transformers' order: the single file before the index.

    A folder can have both: to save a model in one file leaves the index of the shards that were
    there before, and those shards may be older weights.

    Args:
        names: every file name the source has.
        index: the content of `model.safetensors.index.json`, or None when there is none.

    Returns:
        `model.safetensors`, or the files the index names.

    Raises:
        CheckpointRefused: there are none, only pickled ones, or the index names others.
    """
    present = set(names)
    if SINGLE in present:
        return [SINGLE]
    if index is not None:
        wanted = sorted(set(index_map(index).values()))
        if missing := [name for name in wanted if name not in present]:
            raise CheckpointRefused(
                f"{INDEX} names files that are missing: {', '.join(missing)}. If the weights have "
                f"been saved anew under other names since, the index is stale: the weights must be "
                f"{SINGLE}, or an index must name them"
            )
        return wanted
    if pickled := sorted(name for name in present if name.lower().endswith(PICKLED)):
        raise CheckpointRefused(
            f"the weights are only there as {', '.join(pickled[:5])}: such files can run code "
            "when they are loaded and are never read. Use a source with .safetensors files."
        )
    raise CheckpointRefused(f"there are no weights: neither {SINGLE} nor {INDEX}")


def without_stale_index(names: Iterable[str], weights: list[str], index: bytes | None) -> list[str]:
    """The small files to take with the weights: not an index that names other weights.

    Args:
        names: the small files of a source.
        weights: what `weight_files` says.
        index: the content of `model.safetensors.index.json`, or None when there is none.
    """
    stale = index is not None and weights == [SINGLE] and not _names_only(index, SINGLE)
    return [name for name in names if not (stale and name == INDEX)]


def _names_only(index: bytes, file: str) -> bool:
    try:
        return set(index_map(index).values()) == {file}
    except CheckpointRefused:
        return False


def index_map(index: bytes) -> dict[str, str]:
    """Tensor name to file name, out of the content of `model.safetensors.index.json`.

    Raises:
        CheckpointRefused: it is not JSON of that form, or a file name leaves the directory.
    """
    content = parse_json(index, INDEX)
    weights = content.get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise CheckpointRefused(f"{INDEX} has no 'weight_map' from tensor to file")
    for name in weights.values():
        if not is_plain(name) or not name.endswith(".safetensors"):
            raise CheckpointRefused(
                f"{INDEX} names {name!r}: only .safetensors files in the same directory are allowed"
            )
    return weights


def parse_json(content: bytes, name: str) -> dict[str, Any]:
    """A JSON object out of a file that may hold anything.

    Raises:
        CheckpointRefused: it is not JSON, or not an object.
    """
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointRefused(f"{name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointRefused(f"{name} holds no JSON object")
    return value
