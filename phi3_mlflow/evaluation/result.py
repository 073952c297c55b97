"""What an evaluation found of one version."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.figure import Figure

    from phi3_mlflow.evaluation.gate import Verdict
    from phi3_mlflow.evaluation.measurement import Measurement
    from phi3_mlflow.tracking.registry import VersionName

TEXTS_TAG = "evaluation_texts"
"""The tag of a version that holds the fingerprint of the texts it was measured on."""


@dataclass(frozen=True)
class ModelFacts:
    """What a report says of the model beyond what the version's tags hold.

    Attributes:
        description: what it is, in a sentence or two.
        base_model: the model it was made from.
        source: where that came from.
        precision: of its weights.
    """

    description: str
    base_model: str
    source: str
    precision: str


@dataclass(frozen=True)
class Evaluation:
    """What was found of one version.

    Attributes:
        version: in the registry.
        measurement: of this version.
        verdict: of the gate.
        champion: the measurement it was compared with; None without a comparison.
        curve: how it was fine-tuned, if it was: one mapping per point, each with `step` and
            `loss` or `validation_loss`.
        plots: of the report, by name.
    """

    version: VersionName
    measurement: Measurement
    verdict: Verdict
    champion: Measurement | None
    curve: Sequence[Mapping[str, float]] = ()
    plots: Mapping[str, Figure] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """What later steps read of it, as JSON."""
        return {
            "metrics": dict(self.measurement.metrics),
            "verdict": self.verdict.to_dict(),
            "sample": dict(self.measurement.sample),
        }
