"""Assemble the directory that onnxruntime-genai opens, from a checkpoint."""

from __future__ import annotations

import contextlib
import io
import shutil
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from transformers import AutoConfig

from phi3_mlflow.checkpoints.configuration import expected_shapes
from phi3_mlflow.checkpoints.layout import licence_files
from phi3_mlflow.checkpoints.reader import CheckpointReader, read_config
from phi3_mlflow.core.errors import CheckpointRefused, UserError
from phi3_mlflow.core.progress import Progress, no_progress
from phi3_mlflow.genai.builder import rope_of, streaming_builder
from phi3_mlflow.genai.kv_cache import use_int8
from phi3_mlflow.quantization.plan import check_architecture, shares_head
from phi3_mlflow.quantization.stored import StoredQuantization

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
Provider = Literal["cpu", "cuda"]
PROVIDERS: tuple[Provider, ...] = get_args(Provider)


@dataclass(frozen=True)
class ExportReport:
    """What was built.

    Attributes:
        precision: `int4` or `fp32`.
        provider: what it was built for, `cpu` or `cuda`.
        model_bytes, data_bytes: sizes of `model.onnx` and `model.onnx.data`.
        seconds: wall time.
    """

    precision: str
    provider: str
    model_bytes: int
    data_bytes: int
    seconds: float


def export_onnx(
    checkpoint: Path,
    out: Path,
    *,
    precision: Literal["int4", "fp32"],
    accuracy_level: int = 4,
    provider: Provider = "cpu",
    kv_sequences: Sequence[Sequence[int]] = (),
    progress: Progress = no_progress,
) -> ExportReport:
    """Build the ONNX directory of a checkpoint; the weights stream, none is held.

    Equal checkpoint, arguments and library versions give equal bytes.

    Args:
        checkpoint: `int4`: what `quantize_checkpoint` wrote, or another GPTQ version 1 checkpoint
            of a Phi-3; `fp32`: a float checkpoint.
        out: the directory to write into; made if it is not there.
        precision: `int4` or `fp32`.
        accuracy_level: what MatMulNBits computes in (4 int8, 1 float32, 0 the runtime's choice).
        provider: what the graph is for: `cpu` computes in float32, `cuda` in float16, which is
            what onnxruntime has attention for on a GPU, and with int4 weights only.
        kv_sequences: token ids of texts; when there are some, keys and values are kept as int8,
            with scales from what the model makes of them.
        progress: told the bytes written, and the texts read.

    Raises:
        CheckpointRefused: the checkpoint is damaged, of another architecture or precision.
        UserError: an argument that is not allowed.
    """
    started = time.monotonic()
    if provider not in PROVIDERS:
        raise UserError(f"provider {provider!r}: allowed are {' and '.join(PROVIDERS)}")
    if provider == "cuda" and precision != "int4":
        raise UserError(
            f"provider 'cuda' takes precision int4, found {precision}: onnxruntime has no "
            "attention in float32 on a GPU. For full precision there choose flavor transformers"
        )
    if provider == "cuda" and kv_sequences:
        raise UserError(
            "keys and values in int8 are for provider 'cpu', found 'cuda', which keeps them in "
            "float16"
        )
    if accuracy_level not in range(5):
        raise UserError(f"accuracy_level {accuracy_level!r}: allowed are 0, 1, 2, 3 and 4")
    checkpoint_config = read_config(checkpoint)
    stored = _stored_as_asked(checkpoint, checkpoint_config, precision)
    reader = CheckpointReader(checkpoint)
    _refuse_unused(checkpoint_config, reader)
    out.mkdir(parents=True, exist_ok=True)
    for name in (MODEL_FILE, DATA_FILE):
        (out / name).unlink(missing_ok=True)
    with _quiet():
        _build(
            checkpoint, checkpoint_config, stored, reader, out,
            precision=precision, accuracy_level=accuracy_level, provider=provider,
            progress=progress,
        )  # fmt: skip
    if kv_sequences:
        use_int8(out, kv_sequences, rope_of(checkpoint_config).rotated, progress)
    for file in licence_files(checkpoint):
        shutil.copyfile(file, out / file.name)
    return ExportReport(
        precision=precision,
        provider=provider,
        model_bytes=(out / MODEL_FILE).stat().st_size,
        data_bytes=(out / DATA_FILE).stat().st_size,
        seconds=time.monotonic() - started,
    )


def _build(
    checkpoint: Path,
    checkpoint_config: Mapping[str, Any],
    stored: StoredQuantization | None,
    reader: CheckpointReader,
    out: Path,
    *,
    precision: str,
    accuracy_level: int,
    provider: str,
    progress: Progress,
) -> None:
    config = AutoConfig.from_pretrained(str(checkpoint), trust_remote_code=False)
    # The builder gives the attention window to layers that are said to be local, and Phi-3's
    # configuration, where all are, does not say so: without this the graph looks at everything.
    windowed = config.sliding_window and config.sliding_window < config.max_position_embeddings
    kind = "sliding_attention" if windowed else "full_attention"
    config.layer_types = [kind] * config.num_hidden_layers
    options = {
        "accuracy_level": accuracy_level,
        "hf_token": False,
        "hf_remote": False,
        # A cache that holds the window only cannot be rewound to an earlier place of the text.
        "windowed_kv_cache": False,
    }
    with torch.inference_mode():
        builder = streaming_builder(
            config,
            checkpoint_config,
            stored,
            reader,
            precision=precision,
            provider=provider,
            options=options,
            progress=progress,
        )
        builder.make_model(str(checkpoint))
        builder.save_model(str(out))
        builder.make_genai_config(config, {}, str(out))
        builder.save_processing(str(checkpoint), {}, str(out))


def _stored_as_asked(
    checkpoint: Path, config: Mapping[str, Any], precision: str
) -> StoredQuantization | None:
    """How the checkpoint is quantized, once it is known to be of the precision asked for."""
    check_architecture(config)
    if precision == "fp32":
        if config.get("quantization_config") is not None:
            raise CheckpointRefused(
                f"{checkpoint} is quantized; precision fp32 needs the float checkpoint"
            )
        return None
    if precision != "int4":
        raise UserError(f"precision {precision!r}: allowed are int4 and fp32")
    stored = StoredQuantization.read(config, checkpoint)
    if stored is None:
        raise CheckpointRefused(
            f"{checkpoint} is not quantized; run the quantize step on it first, "
            "or export with precision fp32"
        )
    return stored


def _refuse_unused(config: Mapping[str, Any], reader: CheckpointReader) -> None:
    """Refuse tensors that no part of the graph would be built from.

    Raises:
        CheckpointRefused: there are some: biases, say, or a head besides a tied one.
    """
    shares_head(config, reader)
    expected, _ = expected_shapes(config)
    used = {
        f"{name.removesuffix('.weight')}.{part}"
        for name in expected
        for part in ("weight", "qweight", "qzeros", "scales", "g_idx")
    }
    if unused := sorted(set(reader) - used):
        raise CheckpointRefused(
            f"{reader.directory}: {len(unused)} tensors are not part of a Phi-3 and would be left "
            f"out: {', '.join(unused[:5])}"
        )


@contextlib.contextmanager
def _quiet() -> Any:
    """Keep the builder quiet: it prints a line per layer, of use only when it fails."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            yield
    except Exception as error:
        last = said.getvalue().strip().splitlines()[-3:]
        if last:
            error.add_note("the builder's last words: " + " | ".join(last))
        raise
