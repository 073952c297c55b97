"""Say what a checkpoint is, or refuse it: before anything loads it.

Only the float checkpoint of a Phi-3 model in Hugging Face layout passes: its configuration names no
code, its weights are safetensors whose headers hold, every tensor has the shape that the
configuration gives it, and its tokenizer yields no token that the embedding has no row for.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_mlflow.checkpoints import layout
from phi3_mlflow.checkpoints.configuration import (
    ARCHITECTURE,
    TOKEN_IDS,
    config_problems,
    expected_shapes,
    token_problems,
)
from phi3_mlflow.checkpoints.remote_code import CONFIGURATIONS, remote_code_problems
from phi3_mlflow.checkpoints.safetensors_header import TensorEntry, read_header
from phi3_mlflow.checkpoints.tokenizer import tokenizer_problems, vocabulary_size
from phi3_mlflow.core.errors import CheckpointRefused, problem_list

if TYPE_CHECKING:
    from collections.abc import Mapping

FLOAT_DTYPES = frozenset({"F32", "F16", "BF16"})
_MOST_PROBLEMS = 30
_CODE = (".py", ".so", ".dll", ".dylib")


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint is.

    Attributes:
        directory: where it lies.
        architecture: `Phi3ForCausalLM`.
        config: the content of `config.json`.
        dtypes: number of tensors by safetensors dtype (`BF16`, ...).
        parameters: elements of all tensors.
        nbytes: bytes of all tensors.
        tensors: file name and entry of every tensor, by tensor name.
        vocabulary: the highest token id of the tokenizer, plus one.
    """

    directory: Path
    architecture: str
    config: Mapping[str, Any]
    dtypes: dict[str, int]
    parameters: int
    nbytes: int
    tensors: dict[str, tuple[str, TensorEntry]]
    vocabulary: int


def validate_checkpoint(directory: Path) -> CheckpointInfo:
    """Check a checkpoint without loading it; reads headers, JSON files and the vocabulary.

    Args:
        directory: a checkpoint in Hugging Face layout.

    Returns:
        What it is.

    Raises:
        CheckpointRefused: it must not be loaded; lists every reason that was found.
    """
    if not directory.is_dir():
        raise CheckpointRefused(f"there is no checkpoint directory {directory}")
    problems = _file_problems(directory)
    if problems:
        # Nothing is opened while there are links: a link may lead anywhere.
        raise _refused(directory, problems)
    config, problems = _config(directory)
    problems += remote_code_problems(_configurations(directory))
    tensors, found = _tensors(directory)
    problems += found
    if config is not None:
        problems += _tensor_problems(config, tensors)
        problems += _generation_problems(directory, config)
        problems += tokenizer_problems(directory, config)
    if problems or config is None:
        raise _refused(directory, problems)
    entries = [entry for _, entry in tensors.values()]
    return CheckpointInfo(
        directory=directory,
        architecture=ARCHITECTURE,
        config=config,
        dtypes=dict(Counter(entry.dtype for entry in entries)),
        parameters=sum(prod(entry.shape) for entry in entries),
        nbytes=sum(entry.nbytes for entry in entries),
        tensors=tensors,
        vocabulary=vocabulary_size(directory),
    )


def _refused(directory: Path, problems: list[str]) -> CheckpointRefused:
    more = len(problems) - _MOST_PROBLEMS
    shown = problems[:_MOST_PROBLEMS] + ([f"... and {more} more"] if more > 0 else [])
    way_out = "Nothing of it was loaded. Use another source or revision."
    if any(": auto_map" in problem for problem in problems):
        way_out += (
            " Phi-3 needs no code of its own: with `remote_code: drop` in the profile the "
            "references are taken out."
        )
    return CheckpointRefused(problem_list(f"the checkpoint {directory} is refused", shown, way_out))


def _file_problems(directory: Path) -> list[str]:
    """Links, code, pickles, and what is not a regular file, at any depth."""
    problems = []
    for parent, folders, files in os.walk(directory, followlinks=False):
        for name in sorted([*folders, *files]):
            path = Path(parent, name)
            shown = path.relative_to(directory)
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                problems.append(f"{shown} is a link to {path.readlink()}")
            elif stat.S_ISDIR(mode):
                continue
            elif not stat.S_ISREG(mode):
                problems.append(f"{shown} is not a regular file")
            elif name.lower().endswith(layout.PICKLED):
                problems.append(f"{shown} is in a format that can run code when it is loaded")
            elif name.lower().endswith(_CODE):
                problems.append(f"{shown} is code")
    return problems


def _config(directory: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The configuration, None when nothing can be derived from it, and its problems."""
    file = directory / layout.CONFIG
    if not file.is_file():
        return None, [f"{layout.CONFIG} is missing"]
    try:
        config = layout.parse_json(file.read_bytes(), layout.CONFIG)
    except CheckpointRefused as error:
        return None, [str(error)]
    problems = config_problems(config)
    return (None if problems else config), problems


def _generation_problems(directory: Path, config: Mapping[str, Any]) -> list[str]:
    """What generation_config.json says of tokens; a checkpoint may have none."""
    name = "generation_config.json"
    if not (directory / name).is_file():
        return []
    try:
        content = layout.parse_json((directory / name).read_bytes(), name)
    except CheckpointRefused as error:
        return [str(error)]
    return [
        problem
        for key in TOKEN_IDS
        for problem in token_problems(name, key, content.get(key), config["vocab_size"])
    ]


def _configurations(directory: Path) -> dict[str, Any]:
    """The other configurations too; what is not JSON is reported by who needs it."""
    found = {}
    for name in CONFIGURATIONS:
        if (directory / name).is_file():
            try:
                found[name] = layout.parse_json((directory / name).read_bytes(), name)
            except CheckpointRefused:
                continue
    return found


def _tensors(directory: Path) -> tuple[dict[str, tuple[str, TensorEntry]], list[str]]:
    """File and entry of every tensor, by what the files themselves hold."""
    index_file = directory / layout.INDEX
    index: dict[str, str] | None = None
    try:
        content = index_file.read_bytes() if index_file.is_file() else None
        files = layout.weight_files(sorted(path.name for path in directory.iterdir()), content)
        if content is not None and files != [layout.SINGLE]:
            index = layout.index_map(content)
    except CheckpointRefused as error:
        return {}, [str(error)]
    tensors: dict[str, tuple[str, TensorEntry]] = {}
    problems = []
    for file in files:
        try:
            header = read_header(directory / file)
        except CheckpointRefused as error:
            problems.append(str(error))
            continue
        for name, entry in header.items():
            if name in tensors:
                problems.append(f"tensor {name!r} is in {tensors[name][0]} and in {file}")
            tensors[name] = (file, entry)
    if index is not None and not problems:
        problems = _index_problems(index, tensors)
    return tensors, problems


def _index_problems(
    index: dict[str, str], tensors: dict[str, tuple[str, TensorEntry]]
) -> list[str]:
    problems = [
        f"{layout.INDEX} says tensor {name!r} is in {file}, it is "
        + (f"in {tensors[name][0]}" if name in tensors else "nowhere")
        for name, file in index.items()
        if name not in tensors or tensors[name][0] != file
    ]
    return problems + [
        f"tensor {name!r} of {file} is not in {layout.INDEX}"
        for name, (file, _) in tensors.items()
        if name not in index
    ]


def _tensor_problems(
    config: Mapping[str, Any], tensors: dict[str, tuple[str, TensorEntry]]
) -> list[str]:
    """Tensors that are missing, too many, of another shape or no floats."""
    if not tensors:
        return []
    expected, optional = expected_shapes(config)
    problems = []
    for name, shape in expected.items():
        if name not in tensors:
            if name not in optional:
                problems.append(f"tensor {name!r} of shape {shape} is missing")
            continue
        entry = tensors[name][1]
        if entry.shape != shape:
            problems.append(f"tensor {name!r}: {layout.CONFIG} needs {shape}, found {entry.shape}")
        if entry.dtype not in FLOAT_DTYPES:
            allowed = ", ".join(sorted(FLOAT_DTYPES))
            problems.append(f"tensor {name!r}: dtype {entry.dtype}, allowed are {allowed}")
    unknown = [name for name in tensors if name not in expected]
    problems += [f"tensor {name!r} is not part of {ARCHITECTURE}" for name in unknown]
    return problems
