"""What a search for a quantization tries, and what the candidate it keeps must keep to."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from phi3_mlflow.core.section import Section
from phi3_mlflow.quantization.settings import (
    KQuantMixedSettings,
    KQuantSettings,
    QuantizationSettings,
    RtnSettings,
)


class Budget(Section):
    """What a candidate must keep to; None does not limit."""

    data_bytes: int | None = Field(
        default=None, gt=0, description="bytes of model.onnx.data at most"
    )
    tokens_per_second: float | None = Field(default=None, ge=0, description="decode speed at least")
    kl_mean: float | None = Field(default=None, ge=0, description="mean divergence at most")
    top1_agreement: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="share of places with the same likeliest token, at least",
    )


def _default_candidates() -> dict[str, QuantizationSettings]:
    return {
        "rtn": RtnSettings(),
        "k_quant": KQuantSettings(),
        "k_quant_mixed": KQuantMixedSettings(),
    }


class SearchSettings(Section):
    """The quantizations that `algorithm: search` tries, and what the one it keeps must keep to."""

    on: bool = Field(
        default=False, description="try the candidates; the same as quantization.algorithm: search"
    )
    candidates: dict[
        Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 _-]{0,59}$")], QuantizationSettings
    ] = Field(
        default_factory=_default_candidates, min_length=1, description="name: quantization settings"
    )
    budget: Budget = Field(default=Budget(), description="what the candidate kept must keep to")
