"""What can be chosen about quantizing, and which choices do not go together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from phi3_mlflow.core.section import Section

BLOCK_SIZES = (16, 32, 64, 128, 256)
PROJECTIONS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")

Algorithm = Literal["rtn", "k_quant", "k_quant_mixed", "gptq"]
Projection = Literal["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
Matrix = Literal["qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"]
BlockSize = Literal[16, 32, 64, 128, 256]


class QuantizationSettings(Section):
    """The settings of one quantization; equal settings and checkpoints give equal bytes.

    Attributes:
        algorithm: how a weight is rounded. `rtn`: to the nearest step, the scale from the block's
            extremes. `k_quant`: the scale and zero point of each block searched for the least
            weighted squared error. `k_quant_mixed`: the same, with int8 where it pays. `gptq`:
            column by column, each rounding error made good by the columns after it, by the
            second moments of the inputs that calibration texts cause.
        block_size: how many weights of a row share a scale in the int4 matrices.
        symmetric: whether zero is always the middle step; None lets the algorithm choose
            (`rtn` symmetric, the others with a zero point a block).
        int8_projections: the matrices of a decoder layer kept in int8; None lets the algorithm
            choose (`k_quant_mixed`: qkv_proj and down_proj, the others none).
        mixed_layers: the layers where `int8_projections` applies. `some`: llama.cpp's rule, the
            first and last eighth and every third between; `all`; or layer numbers.
        int8_block_size: block size of int8 matrices; None takes `block_size`.
        block_sizes: block sizes of single matrices, over the two above.
        head: precision of the output head; `auto` is int8 when anything else is int8.
        embedding: `shared` uses the quantized head of a tied model also as its embedding, `fp32`
            keeps a float embedding, `int4` and `int8` quantize it by itself; `auto` is `shared`
            for tied models and `fp32` for untied ones.
        accuracy_level: what MatMulNBits computes in: 4 int8, 1 float32, 0 the runtime's choice.
        calibration: texts for `gptq`, a JSONL file with the key `text` or a plain text file.
        calibration_tokens: how many tokens of it are used.
        calibration_length: tokens in one calibration sequence.
        damping: share of the mean diagonal added to the second moments (`gptq`).
        drift_correction: with `gptq`, the share of the drift between the quantized and the full
            model's states that every matrix is adapted to make good; 0 carries no second set of
            states and takes half the time.
        threads: processor threads of `gptq` (streaming). The last bits of its sums depend on it, so
            it is a setting and not the machine's number of cores.
        backend: who runs `gptq`: `streaming` is this project's, a layer in memory at a time;
            `optimum` is optimum.gptq, which holds the whole model and needs gptqmodel.
    """

    algorithm: Algorithm = "k_quant_mixed"
    block_size: BlockSize = 32
    symmetric: bool | None = None
    int8_projections: tuple[Projection, ...] | None = None
    mixed_layers: Literal["some", "all"] | tuple[int, ...] = "some"
    int8_block_size: BlockSize | None = None
    block_sizes: dict[Matrix, BlockSize] = Field(default_factory=dict)
    head: Literal["auto", "int4", "int8"] = "auto"
    embedding: Literal["auto", "shared", "fp32", "int4", "int8"] = "auto"
    accuracy_level: Literal[0, 1, 2, 3, 4] = 4
    calibration: Path | None = None
    calibration_tokens: int = Field(default=16384, ge=256, le=1_048_576)
    calibration_length: int = Field(default=512, ge=32, le=8192)
    damping: float = Field(default=0.01, gt=0, lt=1)
    drift_correction: float = Field(default=0.0, ge=0, le=1)
    threads: int = Field(default=2, ge=1, le=256)
    backend: Literal["streaming", "optimum"] = "streaming"

    @model_validator(mode="after")
    def _together(self) -> Self:
        problems = []
        if self.algorithm == "gptq" and self.calibration is None:
            problems.append("algorithm gptq needs calibration: the path of a file of texts")
        if self.algorithm != "gptq" and self.calibration is not None:
            problems.append(
                f"algorithm {self.algorithm} takes no calibration; leave it out or choose gptq"
            )
        if self.algorithm != "gptq" and self.backend == "optimum":
            problems.append("backend optimum exists for algorithm gptq only")
        if self.algorithm in ("rtn", "k_quant") and self.int8_projections:
            problems.append(
                f"algorithm {self.algorithm} keeps every layer in int4; for int8_projections "
                "choose k_quant_mixed or gptq"
            )
        if self.algorithm == "k_quant_mixed" and self.int8_projections == ():
            problems.append(
                "algorithm k_quant_mixed without int8_projections is k_quant; choose that"
            )
        if self.backend == "optimum" and (self.int8_projections or self.symmetric is False):
            problems.append(
                "backend optimum quantizes every layer to symmetric int4: "
                "leave int8_projections and symmetric out, or choose backend streaming"
            )
        if isinstance(self.mixed_layers, tuple) and any(layer < 0 for layer in self.mixed_layers):
            problems.append(f"mixed_layers holds a negative layer number: {self.mixed_layers}")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def is_symmetric(self) -> bool:
        """Whether int4 zero points stay in the middle, the algorithm's preference applied."""
        if self.symmetric is None:
            return self.algorithm == "rtn" or self.backend == "optimum"
        return self.symmetric

    def projections_in_int8(self) -> tuple[str, ...]:
        """The projections that `mixed_layers` keeps in int8."""
        if self.int8_projections is not None:
            return self.int8_projections
        return ("qkv_proj", "down_proj") if self.algorithm == "k_quant_mixed" else ()

    def layers_in_int8(self, layers: int) -> frozenset[int]:
        """The layers of a model of `layers` layers where the int8 projections are.

        `some` is llama.cpp's choice for the mixed quantizations, also the builder's:
        https://github.com/ggml-org/llama.cpp/blob/36667c8edcded08063ed51c7d57e9e086bbfc903/src/llama-quant.cpp#L136
        """
        if self.mixed_layers == "all":
            return frozenset(range(layers))
        if self.mixed_layers == "some":
            eighth = layers / 8
            return frozenset(
                i
                for i in range(layers)
                if i < eighth or i >= 7 * eighth or (i - round(eighth)) % 3 == 2
            )
        return frozenset(self.mixed_layers)

    def block_size_of(self, matrix: str, bits: int) -> int:
        """Block size of a matrix (`qkv_proj` ... `lm_head`) of so many bits."""
        general = self.int8_block_size or self.block_size if bits == 8 else self.block_size
        return {str(name): int(size) for name, size in self.block_sizes.items()}.get(
            matrix, general
        )

    def head_bits(self) -> int:
        """Bits of the output head's weights, 4 or 8."""
        if self.head == "auto":
            return 8 if self.projections_in_int8() else 4
        return int(self.head.removeprefix("int"))


class Budget(Section):
    """What a candidate must keep to; None does not limit."""

    data_bytes: int | None = Field(default=None, gt=0, description="of model.onnx.data at most")
    tokens_per_second: float | None = Field(default=None, ge=0, description="at least")
    kl_mean: float | None = Field(default=None, ge=0, description="at most")
    top1_agreement: float | None = Field(default=None, ge=0, le=1, description="at least")


def _default_candidates() -> dict[str, QuantizationSettings]:
    return {
        name: QuantizationSettings(algorithm=name) for name in ("rtn", "k_quant", "k_quant_mixed")
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
    budget: Budget = Budget()
