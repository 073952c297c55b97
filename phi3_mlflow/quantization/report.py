"""What a quantization has come to, in numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from phi3_mlflow.quantization.plan import CopyPlan, QuantizationPlan

if TYPE_CHECKING:
    from phi3_mlflow.quantization.settings import QuantizationSettings


@dataclass(frozen=True)
class QuantizationReport:
    """What was done.

    Attributes:
        algorithm: as in the settings.
        int4_weights, int8_weights, copied_weights: numbers of weights.
        bytes_in, bytes_out: of tensors read and written.
        seconds: wall time.
        bits_per_weight: of the quantized matrices, scales and zero points counted as stored.
    """

    algorithm: str
    int4_weights: int
    int8_weights: int
    copied_weights: int
    bytes_in: int
    bytes_out: int
    seconds: float
    bits_per_weight: float


def make_report(
    plan: QuantizationPlan,
    settings: QuantizationSettings,
    bytes_in: int,
    bytes_out: int,
    seconds: float,
) -> QuantizationReport:
    """Sum up what a plan has come to.

    Args:
        plan: what became of the tensors.
        settings: the choices.
        bytes_in: of tensors read.
        bytes_out: of tensors written.
        seconds: wall time.
    """
    counts = {4: 0, 8: 0}
    packed = 0
    for step in plan.linears():
        counts[step.bits] += step.rows * step.columns
        sizes = {name: tensor.nbytes for name, tensor in step.announced().items()}
        packed += sum(size for name, size in sizes.items() if not name.endswith("g_idx"))
    copied = [step.tensor for step in plan.steps if isinstance(step, CopyPlan)]
    return QuantizationReport(
        algorithm=settings.algorithm,
        int4_weights=counts[4],
        int8_weights=counts[8],
        copied_weights=sum(math.prod(tensor.shape) for tensor in copied),
        bytes_in=bytes_in,
        bytes_out=bytes_out,
        seconds=seconds,
        bits_per_weight=packed * 8 / max(1, counts[4] + counts[8]),
    )
