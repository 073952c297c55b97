"""Which matrices of a model get an adapter, and the adapter's configuration.

peft refuses a list of names only when *none* of them is in the model, so a list in which one name
is right trains less than was meant, without a word. Here every name has to match.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from phi3_mlflow.checkpoints.reader import CheckpointReader
from phi3_mlflow.core.errors import EnvironmentProblem, UserError, problem_list
from phi3_mlflow.core.machine import free_disk

if TYPE_CHECKING:
    from peft import LoraConfig

    from phi3_mlflow.training.settings import TrainSettings

_ROOM_TO_SPARE = 64 << 20  # bytes
_IN_A_LAYER = re.compile(r"model\.layers\.\d+\.(?P<module>.+)\.weight")


Headers = Path | CheckpointReader
"""A checkpoint of which only the headers are read: its folder, or its reader."""


def reader_of(checkpoint: Headers) -> CheckpointReader:
    """The reader of a checkpoint."""
    return CheckpointReader(checkpoint) if isinstance(checkpoint, Path) else checkpoint


def adapted_tensors(reader: CheckpointReader, targets: tuple[str, ...]) -> list[str]:
    """The matrices of a checkpoint that get an adapter, in the checkpoint's order.

    Args:
        reader: of the checkpoint; only headers are read.
        targets: names of projections, as `qkv_proj` or `self_attn.qkv_proj`.

    Returns:
        Names of tensors, as `model.layers.0.self_attn.qkv_proj.weight`.

    Raises:
        UserError: some of the names match nothing; says which, and what the model has.
    """
    modules = {
        name: found["module"]
        for name in reader
        if len(reader.shape(name)) == 2 and (found := _IN_A_LAYER.fullmatch(name))
    }
    there = {target: {n for n, m in modules.items() if _is(m, target)} for target in targets}
    if strangers := [target for target, matched in there.items() if not matched]:
        last = sorted({module.rpartition(".")[2] for module in modules.values()})
        raise UserError(
            problem_list(
                "train.target_modules names what no layer of the model has",
                strangers,
                f"The model has {', '.join(last)}.",
            )
        )
    chosen = set().union(*there.values())
    return [name for name in modules if name in chosen]


def lora_config(settings: TrainSettings) -> LoraConfig:
    """The adapter's configuration, for peft."""
    from peft import LoraConfig, TaskType

    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=list(settings.target_modules),
        bias="none",
    )


def room_for(checkpoint: Headers, settings: TrainSettings) -> int:
    """Bytes of disk that training takes for its checkpoints and the merged model.

    Raises:
        UserError: target modules that the model does not have.
    """
    reader = reader_of(checkpoint)
    adapted = adapted_tensors(reader, settings.target_modules)
    adapter = 4 * settings.lora_r * sum(sum(reader.shape(name)) for name in adapted)
    merged = sum(reader.entry(name).nbytes for name in reader)
    # Two checkpoints and the one being written, each with two moments of every weight.
    return 3 * 3 * adapter + merged + _ROOM_TO_SPARE


def require_room(checkpoint: Path, settings: TrainSettings, place: Path) -> None:
    """Refuse to start where the disk has no room for the checkpoints and the merged model.

    Args:
        checkpoint: that is trained; only headers are read.
        settings: the choices.
        place: a folder on the disk in question.

    Raises:
        EnvironmentProblem: there is too little; says how much is needed.
        UserError: target modules that the model does not have.
    """
    needed = room_for(checkpoint, settings)
    if (free := free_disk(place)) < needed:
        raise EnvironmentProblem(
            f"training needs {needed / 1e9:.2f} GB of disk for its checkpoints and the merged "
            f"model, and {place} has {free / 1e9:.2f} GB free. Free some, or set "
            "PHI3_MLFLOW_CACHE to a folder on a larger disk."
        )


def _is(module: str, target: str) -> bool:
    """Whether a target names a module, as peft reads it."""
    return module == target or module.endswith(f".{target}")
