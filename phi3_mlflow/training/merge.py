"""Add an adapter to the matrices it is for, one at a time, into a checkpoint of its own.

W + lora_alpha / lora_r * B A, in float32, written in the checkpoint's dtype: rounded once, at the
end. The model is never in memory as a whole.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from phi3_mlflow.checkpoints import layout
from phi3_mlflow.checkpoints.reader import CheckpointReader
from phi3_mlflow.checkpoints.writer import SHARD_BYTES, Announced, CheckpointWriter
from phi3_mlflow.core.errors import UserError
from phi3_mlflow.runtime.adapter import add_product, key_of

if TYPE_CHECKING:
    from pathlib import Path

    from phi3_mlflow.core.progress import Progress


@dataclass(frozen=True)
class Merged:
    """What merging did.

    Attributes:
        matrices: that the adapter was added to.
        largest_change: the largest change of a weight, before it was rounded.
    """

    matrices: int
    largest_change: float


def merge_adapter(
    checkpoint: Path,
    adapter: Path,
    out: Path,
    progress: Progress,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> Merged:
    """Write a checkpoint with an adapter added to it.

    Args:
        checkpoint: the float checkpoint that the adapter was trained on, Hugging Face layout.
        adapter: a folder in PEFT's format, of LoRA without extras.
        out: an existing directory; gets the tensors, the configuration, tokenizer and licences.
        progress: told the bytes of the checkpoint.
        shard_bytes: bytes of tensors after which a file is full.

    Raises:
        UserError: the adapter is of another kind, or not of this checkpoint.
        CheckpointRefused: the checkpoint cannot be read.
    """
    reader = CheckpointReader(checkpoint)
    scale = _scale(adapter)
    changed, largest = 0, 0.0
    pairs: Any
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as pairs:
        _check(reader, pairs, adapter)
        names = set(pairs.keys())
        announced = {name: _announced(reader, name) for name in reader}
        total = sum(reader.entry(name).nbytes for name in reader)
        with (
            progress("merging the adapter", total) as meter,
            CheckpointWriter(out, announced, shard_bytes) as writer,
        ):
            for name in reader:
                tensor = reader.read(name)
                if key_of(name, "A") in names:
                    a, b = pairs.get_tensor(key_of(name, "A")), pairs.get_tensor(key_of(name, "B"))
                    largest = max(largest, add_product(tensor, a.float(), b.float(), scale))
                    changed += 1
                meter.advance(writer.write(name, tensor))
    for name in layout.small_files(file.name for file in checkpoint.iterdir() if file.is_file()):
        if name != layout.INDEX:
            shutil.copyfile(checkpoint / name, out / name)
    return Merged(changed, largest)


def _scale(adapter: Path) -> float:
    config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    extras = [name for name in ("use_dora", "use_rslora", "fan_in_fan_out") if config.get(name)]
    extras += [name for name in ("rank_pattern", "alpha_pattern") if config.get(name)]
    extras += [] if config.get("bias", "none") == "none" else ["bias"]
    if config.get("peft_type") != "LORA" or extras:
        what = ", ".join(extras) or config.get("peft_type")
        raise UserError(f"the adapter {adapter} is not plain LoRA: {what} cannot be merged")
    return float(config["lora_alpha"] / config["r"])


def _check(reader: CheckpointReader, pairs: Any, adapter: Path) -> None:
    """Refuse an adapter whose matrices are not those of the checkpoint."""
    names = set(pairs.keys())
    known = {key for name in reader for key in (key_of(name, "A"), key_of(name, "B"))}
    if strangers := sorted(names - known):
        raise UserError(
            f"the adapter {adapter} is for matrices that {reader.directory} does not have: "
            + ", ".join(strangers[:5])
        )
    for name in reader:
        keys = [key_of(name, "A"), key_of(name, "B")]
        if not names & set(keys):
            continue
        a, b = (list(pairs.get_slice(key).get_shape()) if key in names else [] for key in keys)
        shape = reader.shape(name)
        if [*b[:1], *a[1:]] != list(shape):
            raise UserError(
                f"the adapter {adapter} does not fit {name} of shape {shape}: A is {a}, B is {b}"
            )


def _announced(reader: CheckpointReader, name: str) -> Announced:
    entry = reader.entry(name)
    return Announced(entry.dtype, entry.shape)
