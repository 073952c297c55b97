"""Write a safetensors checkpoint tensor by tensor, in as many files as it needs.

The header comes first in the file and states every shape, so what will be written is announced
first and then written in that order; nothing has to be held back.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Self, cast

from phi3_mlflow.checkpoints.layout import INDEX

if TYPE_CHECKING:
    from collections.abc import Mapping
    from io import BufferedWriter
    from pathlib import Path
    from types import TracebackType

    import torch

SHARD_BYTES = 4_000_000_000
_ITEM_SIZE = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4, "U8": 1}
_TORCH_NAMES = {
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int32": "I32",
    "torch.uint8": "U8",
}


@dataclass(frozen=True)
class Announced:
    """A tensor that will be written: the format's dtype name and the shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        count = 1
        for size in self.shape:
            count *= size
        return count * _ITEM_SIZE[self.dtype]


class CheckpointWriter:
    """Writes the tensors that were announced, in their order.

    Files are `model.safetensors`, or `model-00001-of-0000N.safetensors` with an index when there is
    more than one. A tensor is never split.
    """

    def __init__(
        self,
        directory: Path,
        tensors: Mapping[str, Announced],
        shard_bytes: int = SHARD_BYTES,
        written: int = 0,
    ) -> None:
        """Plan the files.

        Args:
            directory: an existing directory.
            tensors: what will be written, in order.
            shard_bytes: bytes of data after which a file is full.
            written: how many of the tensors an earlier writer has written there; what the files
                hold beyond them is dropped.
        """
        self._directory = directory
        self._tensors = dict(tensors)
        self._shards = _split(self._tensors, shard_bytes)
        self.written = self._earlier = written
        self._todo = islice(self._tensors, written, None)
        self._file_of = {name: i for i, shard in enumerate(self._shards) for name in shard}
        self._open: BufferedWriter | None = None
        self._open_index = -1

    def __enter__(self) -> Self:
        """Start."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the last file; on success write the index.

        Raises:
            RuntimeError: announced tensors were not written.
        """
        if self._open is not None:
            self._open.close()
        if kind is not None:
            return
        missing = list(self._todo)
        if missing:
            raise RuntimeError(f"announced and not written: {missing[:5]}")
        if len(self._shards) > 1:
            self._write_index()

    def write(self, name: str, tensor: torch.Tensor) -> int:
        """Write the next tensor.

        Args:
            name: must be the next one that was announced.
            tensor: of the announced dtype and shape.

        Returns:
            The bytes written.

        Raises:
            RuntimeError: the tensor is not the one that was announced.
        """
        import torch

        expected = next(self._todo, None)
        found = Announced(_TORCH_NAMES[str(tensor.dtype)], tuple(tensor.shape))
        if expected != name or self._tensors[name] != found:
            raise RuntimeError(
                f"announced {expected} {self._tensors.get(expected or '')}, given {name} {found}"
            )
        stream = self._stream(self._file_of[name])
        if tensor.numel():
            stream.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        self.written += 1
        return found.nbytes

    def sync(self) -> None:
        """Have on the disk what is written so far."""
        if self._open is not None:
            self._open.flush()
            os.fsync(self._open.fileno())

    def _stream(self, index: int) -> BufferedWriter:
        if index != self._open_index or self._open is None:
            if self._open is not None:
                self.sync()
                self._open.close()
            self._open = self._begin(index)
            self._open_index = index
        return self._open

    def _begin(self, index: int) -> BufferedWriter:
        """Open a file behind what it is to keep: its header, and what was written earlier."""
        file, header = self._directory / self._file_name(index), self._shards[index]
        before = sum(map(len, self._shards[:index]))
        kept = header[: max(0, self._earlier - before)]
        stream = file.open("r+b" if kept else "wb")
        stream.write(_header(self._tensors, header))
        stream.seek(sum(self._tensors[name].nbytes for name in kept), os.SEEK_CUR)
        stream.truncate()
        return cast("BufferedWriter", stream)

    def _file_name(self, index: int) -> str:
        if len(self._shards) == 1:
            return "model.safetensors"
        return f"model-{index + 1:05d}-of-{len(self._shards):05d}.safetensors"

    def _write_index(self) -> None:
        index = {
            "metadata": {"total_size": sum(t.nbytes for t in self._tensors.values())},
            "weight_map": {name: self._file_name(i) for name, i in sorted(self._file_of.items())},
        }
        text = json.dumps(index, indent=2) + "\n"
        (self._directory / INDEX).write_text(text, encoding="utf-8")


def _split(tensors: Mapping[str, Announced], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def _header(tensors: Mapping[str, Announced], names: list[str]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
