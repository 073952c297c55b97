"""What can be chosen about quantizing: for every algorithm the settings that it has.

`QuantizationSettings` is the union of them, told apart by `algorithm`. Code that knows the
algorithm constructs its class; code that has values from a file calls `quantization_settings`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from phi3_mlflow.core.section import Section

BLOCK_SIZES = (16, 32, 64, 128, 256)
PROJECTIONS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
DEFAULT_ALGORITHM = "k_quant_mixed"
DEFAULT_DAMPING = 0.01
TRAINED_ROWS = 0.25
"""Share of the calibration that is training rows, for a fine-tuned checkpoint."""

Algorithm = Literal["rtn", "k_quant", "k_quant_mixed", "gptq"]
Projection = Literal["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
Matrix = Literal["qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"]
BlockSize = Literal[16, 32, 64, 128, 256]


class AlgorithmSettings(Section):
    """What every algorithm has; equal settings and checkpoints give equal bytes.

    A recipe of an earlier version lists the settings of all algorithms with their defaults. What
    another algorithm has is therefore dropped where it holds its default, and refused otherwise.
    """

    algorithm: Algorithm
    block_size: BlockSize = Field(
        default=32, description="weights of a row that share a scale, in the int4 matrices"
    )
    symmetric: bool | None = Field(
        default=None,
        description="whether every zero point is the middle step; left out, the algorithm chooses: "
        "rtn and backend optimum are symmetric, the others have a zero point per block",
    )
    int8_block_size: BlockSize | None = Field(
        default=None, description="block size of the int8 matrices; left out, block_size"
    )
    block_sizes: dict[Matrix, BlockSize] = Field(
        default_factory=dict,
        description="block sizes of single matrices, which count more than the other two",
    )
    head: Literal["auto", "int4", "int8"] = Field(
        default="auto",
        description="precision of the output head; auto is int8 when a projection is int8",
    )
    embedding: Literal["auto", "shared", "fp32", "int4", "int8"] = Field(
        default="auto",
        description="shared uses the quantized head of a tied model as its embedding too, fp32 "
        "keeps a float embedding, int4 and int8 quantize it separately; auto is shared for a tied "
        "model and fp32 for an untied one",
    )
    accuracy_level: Literal[0, 1, 2, 3, 4] = Field(
        default=4,
        description="what MatMulNBits computes in: 4 int8, 1 float32, 0 the runtime's choice",
    )

    @model_validator(mode="wrap")
    @classmethod
    def _without_those_of_others(
        cls, values: Any, handler: ModelWrapValidatorHandler[Self]
    ) -> Self:
        if not isinstance(values, Mapping):
            return handler(values)
        own = {key: value for key, value in values.items() if not cls._is_default(key, value)}
        try:
            return handler(own)
        except ValidationError as error:
            problems = [cls._explained(problem) for problem in error.errors()]
            raise ValidationError.from_exception_data(cls.__name__, problems) from error

    @classmethod
    def _is_default(cls, key: str, value: object) -> bool:
        """Whether this is a setting that only others have, and says nothing."""
        if key in cls.model_fields or key not in _OWNERS:
            return False
        field = ALGORITHMS[_OWNERS[key][0]].model_fields[key]
        default = None if field.is_required() else field.get_default()
        return value == default or (default is None and value in ([], ()))

    @classmethod
    def _explained(cls, problem: ErrorDetails) -> InitErrorDetails:
        """The same problem, in words of its own where another algorithm's setting is meant."""
        name, location = str(problem["loc"][0]) if problem["loc"] else "", problem["loc"]
        words = None
        if problem["type"] == "extra_forbidden" and name in _OWNERS:
            words = cls._refusal(name, problem["input"])
        elif name == "calibration" and (problem["type"] == "missing" or problem["input"] is None):
            words, location = "algorithm gptq needs calibration: the path of a file of texts", ()
        if words is not None:
            kind = PydanticCustomError("quantization", "{words}", {"words": words})
            return InitErrorDetails(type=kind, loc=location, input=problem["input"])
        return InitErrorDetails(
            type=problem["type"],
            loc=location,
            input=problem["input"],
            ctx=problem.get("ctx", {}),
        )

    @classmethod
    def _refusal(cls, name: str, value: object) -> str:
        algorithm, owners = cls.model_fields["algorithm"].default, " or ".join(_OWNERS[name])
        if name == "calibration":
            return f"algorithm {algorithm} takes no calibration; leave it out or choose {owners}"
        if name == "backend" and value == "optimum":
            return f"backend optimum exists for algorithm {owners} only"
        if name == "int8_projections":
            return (
                f"algorithm {algorithm} keeps every layer in int4; for int8_projections "
                f"choose {owners}"
            )
        allowed = ", ".join(field for field in cls.model_fields if field != "algorithm")
        return (
            f"{name} belongs to algorithm {owners}; leave it out or choose that. "
            f"Allowed for {algorithm}: {allowed}"
        )

    @model_validator(mode="after")
    def _together(self) -> Self:
        problems = list(self._contradictions())
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _contradictions(self) -> Iterator[str]:
        """The settings that do not go together, one sentence each."""
        yield from ()

    def is_symmetric(self) -> bool:
        """Whether int4 zero points stay in the middle, the algorithm's preference applied."""
        return bool(self.symmetric)

    def projections_in_int8(self) -> tuple[str, ...]:
        """The projections that are kept in int8 in the layers of `layers_in_int8`."""
        return ()

    def layers_in_int8(self, layers: int) -> frozenset[int]:
        """The layers of a model of `layers` layers where the int8 projections are."""
        del layers
        return frozenset()

    def block_size_of(self, matrix: str, bits: int) -> int:
        """Block size of a matrix (`qkv_proj` ... `lm_head`) whose weights have `bits` bits."""
        general = self.int8_block_size or self.block_size if bits == 8 else self.block_size
        return {str(name): int(size) for name, size in self.block_sizes.items()}.get(
            matrix, general
        )

    def head_bits(self) -> int:
        """Bits of the output head's weights, 4 or 8."""
        if self.head == "auto":
            return 8 if self.projections_in_int8() else 4
        return int(self.head.removeprefix("int"))


class MixedPrecisionSettings(AlgorithmSettings):
    """What the algorithms have that can keep some matrices in int8."""

    int8_projections: tuple[Projection, ...] | None = Field(
        default=None,
        description="the matrices of a decoder layer kept in int8; left out, k_quant_mixed takes "
        "qkv_proj and down_proj, and gptq none",
    )
    mixed_layers: Literal["some", "all"] | tuple[int, ...] = Field(
        default="some",
        description="the layers where int8_projections applies: some (llama.cpp's rule: the first "
        "and last eighth and every third between), all, or a list of layer numbers",
    )

    def _contradictions(self) -> Iterator[str]:
        yield from super()._contradictions()
        if isinstance(self.mixed_layers, tuple) and any(layer < 0 for layer in self.mixed_layers):
            yield f"mixed_layers holds a negative layer number: {self.mixed_layers}"

    def projections_in_int8(self) -> tuple[str, ...]:
        """The projections that `mixed_layers` keeps in int8."""
        return self.int8_projections or ()

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


class _Uncalibrated:
    """Mixed into the settings of an algorithm that takes no calibration texts."""

    calibration: ClassVar[None] = None


class RtnSettings(_Uncalibrated, AlgorithmSettings):
    """Round to the nearest step, the scale from the block's extremes."""

    algorithm: Literal["rtn"] = Field(default="rtn", description="round to the nearest step")

    def is_symmetric(self) -> bool:
        """Whether int4 zero points stay in the middle; they do unless told otherwise."""
        return self.symmetric is not False


class KQuantSettings(_Uncalibrated, AlgorithmSettings):
    """Search the scale and zero point of each block for the least weighted squared error."""

    algorithm: Literal["k_quant"] = Field(
        default="k_quant", description="search each block's scale and zero point"
    )


class KQuantMixedSettings(_Uncalibrated, MixedPrecisionSettings):
    """The search of `k_quant`, with int8 where it pays."""

    algorithm: Literal["k_quant_mixed"] = Field(
        default="k_quant_mixed", description="k_quant, with int8 where it pays"
    )

    def _contradictions(self) -> Iterator[str]:
        yield from super()._contradictions()
        if self.int8_projections == ():
            yield "algorithm k_quant_mixed without int8_projections is k_quant; choose that"

    def projections_in_int8(self) -> tuple[str, ...]:
        """The projections that `mixed_layers` keeps in int8."""
        return self.int8_projections or ("qkv_proj", "down_proj")


class GptqSettings(MixedPrecisionSettings):
    """Round column by column; the columns after it make good each one's error.

    The error is weighed by the second moments of the inputs that calibration texts cause.
    """

    algorithm: Literal["gptq"] = Field(
        default="gptq", description="round column by column, calibrated with texts"
    )
    calibration: Path = Field(
        description="texts to calibrate with: a JSONL file with the key text or messages, or a "
        "plain text file; in a profile left out, those that come with the project"
    )
    calibration_tokens: int = Field(
        default=16384, ge=256, le=1_048_576, description="how many tokens of the texts are used"
    )
    calibration_length: int = Field(
        default=512, ge=32, le=8192, description="tokens per calibration sequence"
    )
    calibration_rows: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="share of calibration_tokens taken from the rows that a fine-tuned checkpoint "
        "was trained on, the rest from the texts; left out, "
        f"{TRAINED_ROWS:g} for a fine-tuned checkpoint and 0 for any other",
    )
    damping: float = Field(
        default=DEFAULT_DAMPING,
        gt=0,
        lt=1,
        description="share of the mean diagonal added to the diagonal of the second moments",
    )
    drift_correction: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="how much of the drift between the states of the quantized and the full model "
        "every matrix is adapted to make good; 0 carries no second set of states and takes half "
        "the time",
    )
    threads: int = Field(
        default=2,
        ge=1,
        le=256,
        description="processor threads of backend streaming; the last bits of its sums depend on "
        "them, so it is a setting and not the machine's number of cores",
    )
    backend: Literal["streaming", "optimum"] = Field(
        default="streaming",
        description="streaming is this project's own, with one layer in memory at a time; optimum "
        "is optimum.gptq, which holds the whole model and needs gptqmodel",
    )

    def _contradictions(self) -> Iterator[str]:
        yield from super()._contradictions()
        if self.backend == "optimum" and (self.int8_projections or self.symmetric is False):
            yield (
                "backend optimum quantizes every layer to symmetric int4: "
                "leave int8_projections and symmetric out, or choose backend streaming"
            )

    def share_of_rows(self, *, trained: bool) -> float:
        """The share of the calibration that is training rows, for such a checkpoint."""
        if self.calibration_rows is not None:
            return self.calibration_rows
        return TRAINED_ROWS if trained else 0.0

    def is_symmetric(self) -> bool:
        """Whether int4 zero points stay in the middle, the backend's preference applied."""
        return self.backend == "optimum" if self.symmetric is None else self.symmetric


def _with_algorithm(values: object) -> object:
    """Settings that name no algorithm are those of the default one."""
    if isinstance(values, Mapping):
        return {"algorithm": DEFAULT_ALGORITHM, **values}
    return values


QuantizationSettings = Annotated[
    RtnSettings | KQuantSettings | KQuantMixedSettings | GptqSettings,
    Field(discriminator="algorithm"),
    BeforeValidator(_with_algorithm),
]

ALGORITHMS: Mapping[str, type[AlgorithmSettings]] = {
    "rtn": RtnSettings,
    "k_quant": KQuantSettings,
    "k_quant_mixed": KQuantMixedSettings,
    "gptq": GptqSettings,
}
# The algorithms that have a setting, for the settings that not all of them have.
_OWNERS: Mapping[str, list[str]] = {
    name: [key for key, kind in ALGORITHMS.items() if name in kind.model_fields]
    for settings in ALGORITHMS.values()
    for name in settings.model_fields
    if name not in AlgorithmSettings.model_fields
}

_ADAPTER: TypeAdapter[QuantizationSettings] = TypeAdapter(QuantizationSettings)


def quantization_settings(values: Mapping[str, object]) -> QuantizationSettings:
    """The settings that values from a file stand for.

    Args:
        values: setting to value; without `algorithm` they are those of the default algorithm.

    Raises:
        pydantic.ValidationError: they are not valid.
    """
    return _ADAPTER.validate_python(values)
