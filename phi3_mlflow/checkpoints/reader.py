"""Read the tensors of a safetensors checkpoint one at a time, whole or by rows.

Files are read with ordinary reads, not mapped: mapped pages would count as this process's memory
and a checkpoint is larger than what the small machine has.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_mlflow.checkpoints import layout
from phi3_mlflow.checkpoints.safetensors_header import DTYPE_BYTES, read_header
from phi3_mlflow.core.errors import CheckpointRefused

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `offset` counts from the start of `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class CheckpointReader:
    """The tensors of a directory's weights, by name.

    Raises:
        CheckpointRefused: no such file, an unreadable header, or a name in two files.
    """

    def __init__(self, directory: Path) -> None:
        """Read the headers, no data."""
        self.directory = directory
        self._tensors: dict[str, StoredTensor] = {}
        for file in _weight_files(directory):
            for name, stored in _read_header(file):
                if name in self._tensors:
                    raise CheckpointRefused(
                        f"{directory}: tensor {name} is in {self._tensors[name].file.name} "
                        f"and again in {file.name}"
                    )
                self._tensors[name] = stored

    @classmethod
    def imagined(cls, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> CheckpointReader:
        """The headers of a checkpoint that is not there yet; nothing can be read.

        Args:
            shapes: of every tensor.
            dtype: of all of them, by safetensors' name.
        """
        reader = cls.__new__(cls)
        reader.directory = Path("not-fetched-yet")
        reader._tensors = {
            name: StoredTensor(reader.directory, dtype, shape, 0, prod(shape) * DTYPE_BYTES[dtype])
            for name, shape in shapes.items()
        }
        return reader

    def __contains__(self, name: str) -> bool:
        """Whether the checkpoint has this tensor."""
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        """The names, in the order of the files and of their headers."""
        return iter(self._tensors)

    def entry(self, name: str) -> StoredTensor:
        """Where a tensor lies, its dtype and shape.

        Raises:
            CheckpointRefused: there is no such tensor.
        """
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointRefused(f"{self.directory}: there is no tensor {name}") from None

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self.entry(name).shape

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """A tensor as it is stored, or some of its rows (first dimension), in memory of its own.

        Args:
            name: the tensor.
            rows: `slice(start, stop)` of the first dimension; None reads all of it.

        Returns:
            A contiguous tensor of the stored dtype, shape (stop - start, ...).

        Raises:
            CheckpointRefused: no such tensor, a dtype that is not known, or a file that is short.
        """
        import torch

        stored = self.entry(name)
        dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
                  "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
                  "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
                  "BOOL": torch.bool}  # fmt: skip
        if stored.dtype not in dtypes:
            raise CheckpointRefused(
                f"{stored.file.name}: tensor {name} is {stored.dtype}; known are {sorted(dtypes)}"
            )
        offset, shape = stored.offset, stored.shape
        if rows is not None:
            start, stop, _ = rows.indices(shape[0])
            row_bytes = stored.nbytes // shape[0] if shape[0] else 0
            offset += start * row_bytes
            shape = (stop - start, *shape[1:])
        tensor = torch.empty(shape, dtype=dtypes[stored.dtype])
        view = tensor.view(-1).view(torch.uint8).numpy().data if tensor.numel() else None
        if view is not None:
            with stored.file.open("rb", buffering=0) as stream:
                stream.seek(offset)
                _read_all(stream, view, stored.file, name)
        return tensor

    def read_float(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """The same as `read`, as float32.

        Raises:
            CheckpointRefused: the tensor is not a float, or holds infinities or NaN.
        """
        import torch

        tensor = self.read(name, rows)
        if not tensor.is_floating_point():
            raise CheckpointRefused(f"{self.directory}: tensor {name} is {tensor.dtype}, no float")
        tensor = tensor.to(torch.float32)
        if not bool(torch.isfinite(tensor.sum())) and not bool(torch.isfinite(tensor).all()):
            raise CheckpointRefused(f"{self.directory}: tensor {name} holds infinities or NaN")
        return tensor


def read_config(directory: Path) -> dict[str, Any]:
    """The `config.json` of a checkpoint, as a dictionary.

    Raises:
        CheckpointRefused: there is none, or it is not a JSON object.
    """
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointRefused(f"{directory}: there is no config.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointRefused(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointRefused(f"{path} holds no JSON object")
    return config


def _weight_files(directory: Path) -> list[Path]:
    """The single file, then what the index names, then whatever is there."""
    if (directory / layout.SINGLE).is_file():
        return [directory / layout.SINGLE]
    names = {path.name for path in directory.glob("*.safetensors")}
    if names and (directory / layout.INDEX).is_file():
        index = (directory / layout.INDEX).read_bytes()
        return [directory / name for name in layout.weight_files(names, index)]
    files = sorted(directory / name for name in names)
    if not files:
        raise CheckpointRefused(f"{directory}: there is no *.safetensors file in it")
    return files


def _read_header(file: Path) -> Iterator[tuple[str, StoredTensor]]:
    for name, entry in read_header(file).items():
        yield (
            name,
            StoredTensor(file, entry.dtype, tuple(entry.shape), entry.offset, entry.nbytes),
        )


def _read_all(stream: Any, view: memoryview, file: Path, name: str) -> None:
    done = 0
    while done < len(view):
        count = stream.readinto(view[done:])
        if not count:
            raise CheckpointRefused(f"{file.name} ends inside tensor {name}: it was cut short")
        done += count
