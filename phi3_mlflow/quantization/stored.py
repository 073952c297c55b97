"""How a checkpoint says that it is quantized: `quantization_config` of its `config.json`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phi3_mlflow.core.errors import CheckpointRefused

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@dataclass(frozen=True)
class StoredQuantization:
    """How the matrices of a checkpoint in GPTQ's format, version 1, are stored.

    Attributes:
        bits: of a weight, model-wide.
        group_size: weights of a row that share a scale, model-wide; -1 is all of a row.
        dynamic: bits and group sizes that differ, by regular expression on the module's name.
        embedding_bits: of a quantized embedding, 0 for a float one.
        shared_embedding: whether the embedding is read from the quantized head.
    """

    bits: int
    group_size: int
    dynamic: Mapping[str, Mapping[str, Any]]
    embedding_bits: int
    shared_embedding: bool

    @classmethod
    def read(cls, config: Mapping[str, Any], checkpoint: Path) -> StoredQuantization | None:
        """What a `config.json` says; None for a float checkpoint.

        Args:
            config: the content of `config.json`.
            checkpoint: where it lies, for messages.

        Raises:
            CheckpointRefused: the checkpoint is quantized in a way that is not read here.
        """
        stored = config.get("quantization_config")
        if stored is None:
            return None
        if stored.get("quant_method") != "gptq":
            raise CheckpointRefused(
                f"{checkpoint}: quant_method is {stored.get('quant_method')!r}; this reads gptq"
            )
        if stored.get("checkpoint_format", "gptq") != "gptq":
            raise CheckpointRefused(
                f"{checkpoint}: checkpoint_format is {stored['checkpoint_format']!r}, whose zero "
                "points are stored differently; this reads version 1 ('gptq')"
            )
        if stored.get("desc_act"):
            raise CheckpointRefused(f"{checkpoint}: desc_act (reordered columns) is not supported")
        sizes = [stored.get("bits"), stored.get("group_size")]
        if not all(isinstance(size, int) for size in sizes):
            raise CheckpointRefused(
                f"{checkpoint}: quantization_config has bits and group_size {sizes}; whole "
                "numbers are needed"
            )
        meta = stored.get("meta") or {}
        return cls(
            bits=stored["bits"],
            group_size=stored["group_size"],
            dynamic=stored.get("dynamic") or {},
            embedding_bits=int(meta.get("embedding_bits", 0)),
            shared_embedding=bool(meta.get("shared_embedding")),
        )

    def layout_of(self, module: str) -> tuple[int, int]:
        """Bits and group size of a module.

        Args:
            module: such as `model.layers.0.mlp.down_proj`. The first expression of `dynamic` that
                matches from the start of its name counts.
        """
        for pattern, override in self.dynamic.items():
            if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), module):
                return (
                    int(override.get("bits", self.bits)),
                    int(override.get("group_size", self.group_size)),
                )
        return self.bits, self.group_size
