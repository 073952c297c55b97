"""The profile's section `runtime`: how a logged model runs."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from phi3_mlflow.core.section import Section


class RuntimeSettings(Section):
    """How the logged ONNX model runs; every value but `kv_cache` can be overridden when loaded."""

    threads: int = Field(default=0, ge=0, le=1024, description="CPU threads; 0 takes all cores")
    max_context: int | None = Field(
        default=None,
        ge=16,
        description="tokens of prompt and answer together; default: the model's",
    )
    provider: Literal["cpu", "cuda"] = Field(
        default="cpu",
        description="where the model answers; cuda exports the ONNX model for a GPU, in float16",
    )
    kv_cache: Literal["float32", "int8"] = Field(
        default="float32",
        description="what keys and values are kept as; int8 takes a quarter of the memory for "
        "every token of the context; part of the graph that is exported",
    )

    def for_loading(self) -> dict[str, Any]:
        """The values that a logged model is loaded with, as its `model_config` has them."""
        return self.model_dump(mode="json", exclude_none=True, exclude={"kv_cache"})
