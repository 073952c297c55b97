"""The profile's section `runtime`: how a logged model runs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from phi3_mlflow.core.section import Section


class RuntimeSettings(Section):
    """How the logged ONNX model runs; every value can be overridden when it is loaded."""

    threads: int = Field(default=0, ge=0, le=1024, description="CPU threads; 0 takes all cores")
    max_context: int | None = Field(
        default=None,
        ge=16,
        description="tokens of prompt and answer together; default: the model's",
    )
    provider: Literal["cpu", "cuda"] = "cpu"
