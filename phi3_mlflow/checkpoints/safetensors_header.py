"""Read the header of a safetensors file without believing it.

The header states where in the file every tensor lies. Whoever reads tensors by these figures reads
what the header says, so nothing in it is taken on trust: the sizes must follow from dtypes and
shapes, the tensors must fill the file from the header's end to the last byte, without overlap and
without holes, and no name may appear twice.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from phi3_mlflow.core.errors import CheckpointRefused, problem_list

if TYPE_CHECKING:
    from pathlib import Path

_LENGTH_BYTES = 8
_LARGEST_HEADER = 100_000_000  # bytes; the limit of the reference implementation
_LARGEST_DIMENSION = 2**48  # far beyond any real tensor, far below what overflows 64 bits
_MOST_DIMENSIONS = 8
_MOST_PROBLEMS = 20
_METADATA = "__metadata__"

DTYPE_BYTES: dict[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}
"""Bytes per element, by the format's name of the dtype. Types smaller than a byte are refused."""


class TensorEntry(NamedTuple):
    """Where one tensor lies.

    Attributes:
        dtype: the format's name, a key of `DTYPE_BYTES`.
        shape: the dimensions; `()` is a scalar. The values lie in C order, little-endian.
        offset: the first byte, counted from the start of the file.
        nbytes: how many bytes; always what dtype and shape need.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Read and check where the tensors of a safetensors file lie.

    Args:
        file: a safetensors file.

    Returns:
        The tensors by name, in the order in which they lie in the file.

    Raises:
        CheckpointRefused: the file is not a safetensors file, or its header lies; the message
            lists what is wrong.
    """
    header, data_start, file_size = _load(file)
    entries: dict[str, TensorEntry] = {}
    problems: list[str] = []
    for name, value in header.items():
        if name == _METADATA:
            problems.extend(_metadata_problems(value))
            continue
        entry = _entry(name, value, data_start)
        if isinstance(entry, TensorEntry):
            entries[name] = entry
        else:
            problems.append(entry)
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    if not problems:
        problems = _layout_problems(entries, data_start, file_size)
    if problems:
        more = len(problems) - _MOST_PROBLEMS
        shown = problems[:_MOST_PROBLEMS] + ([f"... and {more} more"] if more > 0 else [])
        raise CheckpointRefused(
            problem_list(
                f"{file.name} has a safetensors header that does not hold",
                shown,
                "The file is damaged or was made to mislead; fetch it again or use another source.",
            )
        )
    return entries


def read_metadata(file: Path) -> dict[str, str]:
    """The free text a safetensors file carries about itself (`{"format": "pt"}` and the like).

    Args:
        file: a safetensors file.

    Returns:
        The `__metadata__` of the header, empty when there is none.

    Raises:
        CheckpointRefused: the file is not a safetensors file.
    """
    metadata = _load(file)[0].get(_METADATA, {})
    if problems := _metadata_problems(metadata):
        raise CheckpointRefused(f"{file.name}: {problems[0]}")
    return dict(metadata)


def _load(file: Path) -> tuple[dict[str, Any], int, int]:
    """The parsed header, where the data starts, and the size of the file, in bytes."""
    with file.open("rb") as stream:
        file_size = stream.seek(0, 2)
        stream.seek(0)
        if file_size < _LENGTH_BYTES:
            raise CheckpointRefused(
                f"{file.name} is not a safetensors file: it has {file_size} bytes, "
                f"the length of the header alone takes {_LENGTH_BYTES}"
            )
        length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
        if length > _LARGEST_HEADER:
            raise CheckpointRefused(
                f"{file.name}: the safetensors header claims {length} bytes, "
                f"at most {_LARGEST_HEADER} are allowed"
            )
        if length > file_size - _LENGTH_BYTES:
            raise CheckpointRefused(
                f"{file.name}: the safetensors header claims {length} bytes, "
                f"the file has {file_size - _LENGTH_BYTES} after the length: it is cut off"
            )
        raw = stream.read(length)
    if not raw.startswith(b"{"):
        raise CheckpointRefused(f"{file.name}: the safetensors header does not start with '{{'")
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        # ValueError covers JSON, UTF-8, integers of absurd length and the duplicates below.
        raise CheckpointRefused(f"{file.name}: unreadable safetensors header: {error}") from error
    return header, _LENGTH_BYTES + length, file_size


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON parsers differ in which of two equal keys wins, so a file may hold none."""
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} appears twice")
    return result


def _metadata_problems(value: Any) -> list[str]:
    if isinstance(value, dict) and all(isinstance(text, str) for text in value.values()):
        return []
    return [f"{_METADATA} must map text to text"]


def _is_size(value: Any, largest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= largest


def _entry(name: str, value: Any, data_start: int) -> TensorEntry | str:
    """One tensor's entry, or what is wrong with it."""
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        return f"{name!r}: an entry has exactly the keys dtype, shape and data_offsets"
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        return f"{name!r}: dtype {dtype!r} is not among {', '.join(DTYPE_BYTES)}"
    if (
        not isinstance(shape, list)
        or len(shape) > _MOST_DIMENSIONS
        or not all(_is_size(dimension, _LARGEST_DIMENSION) for dimension in shape)
    ):
        return f"{name!r}: shape {_brief(shape)} is not a list of up to 8 sizes"
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(_is_size(offset, 2**63 - 1) for offset in offsets)
        or offsets[0] > offsets[1]
    ):
        return f"{name!r}: data_offsets {_brief(offsets)} are not [first, past the last] byte"
    nbytes = offsets[1] - offsets[0]
    needed = prod(shape) * DTYPE_BYTES[dtype]
    if nbytes != needed:
        return (
            f"{name!r}: {dtype} of shape {shape} takes {needed} bytes, "
            f"data_offsets {offsets} hold {nbytes}"
        )
    return TensorEntry(dtype, tuple(shape), data_start + offsets[0], nbytes)


def _layout_problems(entries: dict[str, TensorEntry], data_start: int, file_size: int) -> list[str]:
    """Overlaps, holes and a wrong end; `entries` in the order in which they lie."""
    problems = []
    position, previous = data_start, "the header"
    for name, entry in entries.items():
        if entry.offset < position:
            problems.append(f"{name!r} overlaps {previous} by {position - entry.offset} bytes")
        elif entry.offset > position:
            problems.append(f"a hole of {entry.offset - position} bytes lies before {name!r}")
        position, previous = max(position, entry.offset + entry.nbytes), repr(name)
    if position != file_size:
        problems.append(
            f"the tensors end at byte {position}, the file has {file_size} bytes"
            + (": it is cut off" if position > file_size else "")
        )
    return problems


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
