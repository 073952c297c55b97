"""Write what a quantized checkpoint holds besides tensors: its config and the tokenizer's files."""

from __future__ import annotations

import json
import re
import shutil
from typing import TYPE_CHECKING, Any

from phi3_mlflow.quantization.settings import DEFAULT_DAMPING, GptqSettings, QuantizationSettings

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from phi3_mlflow.quantization.plan import QuantizationPlan

# What else of a checkpoint belongs to the model; anything not named here stays behind.
COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "LICENSE*",
    "NOTICE*",
)


def write_config(
    out: Path, config: Mapping[str, Any], plan: QuantizationPlan, settings: QuantizationSettings
) -> None:
    """Write `config.json` with the `quantization_config` that says how to read the tensors.

    Matrices that differ from the model-wide bits and group size are named in `dynamic`, as
    GPTQModel writes it: regular expressions after `+:`, and the first that matches wins.
    """
    bits4 = [step for step in plan.linears() if step.bits == 4]
    quantization = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": 4,
        "group_size": settings.block_size,
        "sym": all(step.symmetric for step in bits4),
        "desc_act": False,
        "static_groups": False,
        "true_sequential": True,
        "damp_percent": settings.damping if isinstance(settings, GptqSettings) else DEFAULT_DAMPING,
        "lm_head": True,
        "dynamic": _overrides(plan, settings),
        "meta": {
            "quantizer": "phi3-mlflow",
            "algorithm": settings.algorithm,
            "accuracy_level": settings.accuracy_level,
            "embedding_bits": plan.embedding_bits,
            "shared_embedding": plan.shared_embedding,
        },
    }
    text = json.dumps({**config, "quantization_config": quantization}, indent=2) + "\n"
    (out / "config.json").write_text(text, encoding="utf-8")


def copy_companions(checkpoint: Path, out: Path) -> None:
    """Copy tokenizer, chat template, generation config and licence files."""
    for pattern in COMPANIONS:
        for file in sorted(checkpoint.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, out / file.name)


def _overrides(
    plan: QuantizationPlan, settings: QuantizationSettings
) -> dict[str, dict[str, int | bool]]:
    groups: dict[tuple[str, int, int], list[int | None]] = {}
    for step in plan.linears():
        if (step.bits, step.block_size) != (4, settings.block_size):
            module = step.name.split(".", 3)[-1]
            groups.setdefault((module, step.bits, step.block_size), []).append(step.layer)
    overrides: dict[str, dict[str, int | bool]] = {}
    for (module, bits, block_size), layers in groups.items():
        if layers == [None]:
            pattern = f"+:{module}"
        else:
            numbers = "|".join(map(str, layers))
            pattern = rf"+:model\.layers\.({numbers})\." + re.escape(module)
        overrides[pattern] = {"bits": bits, "group_size": block_size, "sym": True}
    return overrides
