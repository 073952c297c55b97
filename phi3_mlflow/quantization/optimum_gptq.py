"""GPTQ by Hugging Face's optimum, brought into the format that everything here reads.

Unlike the streaming quantizer this holds the whole model in float32, rounds the decoder's matrices
to symmetric int4 and leaves the head alone. It needs `optimum` and `gptqmodel`, which compiles a
C++ extension when it first packs a model. It is here for comparison and for those who rely on it.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from phi3_mlflow.checkpoints.reader import CheckpointReader, read_config
from phi3_mlflow.checkpoints.writer import CheckpointWriter
from phi3_mlflow.core.errors import EnvironmentProblem, ProjectError
from phi3_mlflow.core.progress import Progress, no_progress
from phi3_mlflow.quantization import packing
from phi3_mlflow.quantization.calibration import calibration_sequences
from phi3_mlflow.quantization.description import copy_companions, write_config
from phi3_mlflow.quantization.matrices import copy_tensor, stream_linear, write_linear
from phi3_mlflow.quantization.plan import CopyPlan, LinearPlan, make_plan
from phi3_mlflow.quantization.report import QuantizationReport, make_report
from phi3_mlflow.quantization.rounding import Rounded, k_quant

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phi3_mlflow.quantization.settings import GptqSettings
    from phi3_mlflow.rows.texts import Conversation


def quantize_with_optimum(
    checkpoint: Path,
    out: Path,
    settings: GptqSettings,
    progress: Progress = no_progress,
    *,
    rows: Sequence[Conversation] = (),
) -> QuantizationReport:
    """The same as `quantize_checkpoint`, by optimum.

    Raises:
        EnvironmentProblem: optimum or gptqmodel is not installed.
        CheckpointRefused, UserError: as `quantize_checkpoint`.
    """
    started = time.monotonic()
    quantizer_class = _optimum()
    config, reader = read_config(checkpoint), CheckpointReader(checkpoint)
    plan = make_plan(config, reader, settings)
    out.mkdir(parents=True, exist_ok=True)
    total = sum(reader.entry(name).nbytes for name in reader)
    written = 0
    with tempfile.TemporaryDirectory(dir=out) as temporary:
        _run(quantizer_class, checkpoint, Path(temporary), settings, rows)
        found = CheckpointReader(Path(temporary))
        with (
            CheckpointWriter(out, plan.announced()) as writer,
            progress("writing what optimum quantized", total) as meter,
        ):
            for step in plan.steps:
                if isinstance(step, CopyPlan):
                    written += copy_tensor(reader, step, writer, meter)
                elif step.layer is None:
                    written += stream_linear(reader, step, k_quant, writer, meter)
                else:
                    written += _take_over(found, reader, step, writer)
                    meter.advance(reader.entry(step.source).nbytes)
    write_config(out, config, plan, settings)
    copy_companions(checkpoint, out)
    return make_report(plan, settings, total, written, time.monotonic() - started)


def _optimum() -> Any:
    try:
        import gptqmodel  # noqa: F401
        from optimum.gptq import GPTQQuantizer
    except ImportError as error:
        raise EnvironmentProblem(
            f"backend optimum is not installed ({error}); install it with\n"
            "  pip install -c requirements/constraints-gptq.txt optimum gptqmodel\n"
            "or leave backend out: the streaming GPTQ needs neither"
        ) from error
    return GPTQQuantizer


def _run(
    quantizer_class: Any,
    checkpoint: Path,
    directory: Path,
    settings: GptqSettings,
    rows: Sequence[Conversation],
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(checkpoint), trust_remote_code=False)
    sequences = calibration_sequences(checkpoint, settings, rows)
    model = AutoModelForCausalLM.from_pretrained(
        str(checkpoint), dtype=torch.float32, trust_remote_code=False, use_safetensors=True
    )
    quantizer = quantizer_class(
        bits=4,
        dataset=[tokenizer.decode(sequence) for sequence in sequences],
        group_size=settings.block_size,
        damp_percent=settings.damping,
        desc_act=False,
        sym=True,
        model_seqlen=settings.calibration_length,
        batch_size=1,
    )
    quantizer.save(quantizer.quantize_model(model, tokenizer), str(directory))


def _take_over(
    found: CheckpointReader, reader: CheckpointReader, step: LinearPlan, writer: CheckpointWriter
) -> int:
    """Copy a matrix's tensors, its zero points stated anew.

    optimum 2.3.0 labels its files `gptq_v2` and stores version 1's zero points in some releases of
    gptqmodel and version 2's in others, so the label is not believed: symmetric zero points are 8,
    and the weights that result are compared with the original ones.
    """
    for name, announced in step.announced().items():
        if found.shape(name) != announced.shape:
            raise ProjectError(
                f"optimum stored {name} with shape {found.shape(name)}, not {announced.shape}"
            )
    codes = packing.unpack_gptq_weight(found.read(f"{step.name}.qweight"), step.bits)
    scales = found.read_float(f"{step.name}.scales").T.contiguous()
    zeros = torch.full(scales.shape, 2 ** (step.bits - 1), dtype=torch.uint8)
    rounded = Rounded(codes, scales, zeros)
    original = reader.read_float(step.source)
    error = packing.dequantize(*rounded, step.block_size).sub_(original).norm()
    if float(error) > 0.5 * float(original.norm()):
        raise ProjectError(
            f"what optimum stored for {step.name} does not give the original weights when read as "
            "symmetric int4; its format must have changed"
        )
    return write_linear(writer, step, rounded)
