"""Quantize a checkpoint with calibration texts, one decoder layer in memory at a time.

The texts' hidden states are carried from layer to layer through what has been quantized already, so
that every matrix is rounded for the inputs it will really get. Within a layer the four matrices are
done in the order of the computation: qkv_proj, o_proj, gate_up_proj, down_proj.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from phi3_mlflow.checkpoints.writer import CheckpointWriter
from phi3_mlflow.layers.decoder import Decoder
from phi3_mlflow.layers.states import States
from phi3_mlflow.quantization.calibration import calibration_sequences
from phi3_mlflow.quantization.effort import head_effort, layer_effort
from phi3_mlflow.quantization.gptq import gptq
from phi3_mlflow.quantization.matrices import CHUNK_WEIGHTS, copy_tensor, write_linear
from phi3_mlflow.quantization.moments import correct_drift, second_moments
from phi3_mlflow.quantization.packing import dequantize
from phi3_mlflow.quantization.passage import Passage
from phi3_mlflow.quantization.plan import HEAD, CopyPlan, LinearPlan, QuantizationPlan
from phi3_mlflow.quantization.rounding import Rounded, k_quant, rtn
from phi3_mlflow.quantization.unfinished import Found, Unfinished

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from phi3_mlflow.checkpoints.reader import CheckpointReader
    from phi3_mlflow.core.progress import Meter, Progress
    from phi3_mlflow.quantization.settings import GptqSettings
    from phi3_mlflow.rows.texts import Conversation

    Parts = Callable[[], Iterable[torch.Tensor]]


def quantize_calibrated(
    checkpoint: Path,
    reader: CheckpointReader,
    plan: QuantizationPlan,
    settings: GptqSettings,
    out: Path,
    progress: Progress,
    rows: Sequence[Conversation] = (),
    unfinished: Path | None = None,
) -> int:
    """Quantize by GPTQ, layer by layer.

    Args:
        checkpoint: its directory, for the config and the tokenizer.
        reader: its tensors.
        plan: what becomes of them; `steps` are in the order of the computation.
        settings: with `calibration`.
        out: where the tensors are written.
        progress: told what is done; a layer takes as long as another.
        rows: training rows to calibrate with besides the texts.
        unfinished: a folder of this work's own on the same disk as `out`. What is finished is kept
            there, and a run that was killed goes on after its last layer. None keeps nothing.

    Returns:
        The bytes written.

    Raises:
        UserError: the calibration file cannot be used.
    """
    announced, groups = plan.announced(), list(_by_layer(plan))
    with torch.inference_mode(), _threads(settings.threads):
        decoder, kept = Decoder(checkpoint, reader), Unfinished(unfinished, out)
        found = kept.find(decoder.hidden)
        if found is None:
            sequences = calibration_sequences(checkpoint, settings, rows)
            found = _beginning(decoder, sequences, settings, unfinished)
        length = settings.calibration_length
        work = _Work(decoder, found.states, found.ideal, length, settings, unfinished)
        left = groups[found.groups :]
        total = sum(_effort(layer, steps, work.states.places) for layer, steps in left)
        note = f", from layer {left[0][0]} on" if found.groups else ""
        with (
            CheckpointWriter(kept.output, announced, written=found.tensors) as writer,
            progress(f"quantizing ({settings.algorithm}){note}", total, "share") as meter,
        ):
            for done, (layer, steps) in enumerate(left, start=found.groups + 1):
                if layer is None:
                    for step in steps:
                        _outside(work, step, writer, meter)
                else:
                    work.quantize(layer, steps, writer, meter)
                    kept.save(writer, done, work.states, work.ideal)
        kept.deliver()
    return sum(tensor.nbytes for tensor in announced.values())


def _beginning(
    decoder: Decoder, sequences: torch.Tensor, settings: GptqSettings, folder: Path | None
) -> Found:
    """Token ids (sequences, tokens) embedded, and nothing done with them yet."""
    states = States(sequences.numel(), decoder.hidden, folder=folder)
    decoder.embed(sequences.flatten(), states)
    ideal = states.copy(folder=folder) if settings.drift_correction else None
    return Found(groups=0, tensors=0, states=states, ideal=ideal)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Use `count` threads whatever the machine and its environment say: sums are split by them."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _by_layer(plan: QuantizationPlan) -> Iterator[tuple[int | None, list[LinearPlan | CopyPlan]]]:
    group: list[LinearPlan | CopyPlan] = []
    current: int | None = None
    for step in plan.steps:
        parts = step.name.split(".")
        layer = int(parts[2]) if parts[:2] == ["model", "layers"] else None
        if group and (layer != current or layer is None):
            yield current, group
            group = []
        current = layer
        group.append(step)
    if group:
        yield current, group


def _effort(layer: int | None, steps: list[LinearPlan | CopyPlan], places: int) -> int:
    if layer is not None:
        return layer_effort([step for step in steps if isinstance(step, LinearPlan)], places)
    return sum(head_effort(step) for step in steps if isinstance(step, LinearPlan))


@dataclass
class _Work:
    """The calibration states on their way through the model.

    Attributes:
        decoder: the float checkpoint.
        states: of the texts, through what has been quantized already.
        ideal: the same through the float layers, where drift is corrected.
        length: tokens of a sequence.
        settings: the choices.
        folder: for what is too much for memory.
    """

    decoder: Decoder
    states: States
    ideal: States | None
    length: int
    settings: GptqSettings
    folder: Path | None

    def quantize(
        self,
        layer: int,
        steps: list[LinearPlan | CopyPlan],
        writer: CheckpointWriter,
        meter: Meter,
    ) -> None:
        """Quantize the four matrices of a layer and write it; the states go through it."""
        here = Passage(self.decoder, layer, self.states, self.length, self.folder)
        full = None
        if self.ideal is not None:
            full = Passage(self.decoder, layer, self.ideal, self.length, self.folder)
        plans = {s.name.rsplit(".", 1)[-1]: s for s in steps if isinstance(s, LinearPlan)}
        done: dict[str, Rounded] = {}

        def round_matrix(name: str, linear: Any, inputs: Parts, ideal: Parts | None) -> None:
            step = plans[name]
            rounded = _round(linear.weight.data, inputs, ideal, step, self.settings)
            done[step.name] = rounded
            linear.weight.data = dequantize(*rounded, step.block_size)
            meter.advance(layer_effort([step], self.states.places))

        both = [here] if full is None else [here, full]
        attention, mlp = here.module.self_attn, here.module.mlp
        ideal = None if full is None else full.attention_inputs
        round_matrix("qkv_proj", attention.qkv_proj, here.attention_inputs, ideal)
        for passage in both:
            passage.attend()
        kept = None if full is None else full.kept
        round_matrix("o_proj", attention.o_proj, here.kept, kept)
        del attention
        for passage in both:
            passage.leave_attention()
        ideal = None if full is None else full.mlp_inputs
        round_matrix("gate_up_proj", mlp.gate_up_proj, here.mlp_inputs, ideal)
        for passage in both:
            passage.activate()
        round_matrix("down_proj", mlp.down_proj, here.kept, kept)
        for passage in both:
            passage.leave_mlp()
        for step in steps:
            if isinstance(step, CopyPlan):
                copy_tensor(self.decoder.reader, step, writer)
            else:
                write_linear(writer, step, done.pop(step.name))


def _round(
    weights: torch.Tensor,
    inputs: Parts,
    ideal: Parts | None,
    step: LinearPlan,
    settings: GptqSettings,
) -> Rounded:
    if ideal is None and step.bits == 8:
        return rtn(weights, 8, step.block_size, step.symmetric)
    moments = second_moments(inputs())
    if ideal is not None:
        weights = correct_drift(
            weights, inputs(), ideal(), moments, settings.damping, settings.drift_correction
        )
    if step.bits == 8:
        return rtn(weights, 8, step.block_size, step.symmetric)
    return gptq(weights, moments, step.bits, step.block_size, step.symmetric, settings.damping)


def _outside(
    work: _Work, step: LinearPlan | CopyPlan, writer: CheckpointWriter, meter: Meter
) -> None:
    """Embedding, final norm and head."""
    reader = work.decoder.reader
    if isinstance(step, CopyPlan):
        copy_tensor(reader, step, writer)
        return
    assert step.name == HEAD
    importance = _importance(work) if step.bits == 4 else None
    parts = []
    chunk = max(8, CHUNK_WEIGHTS // step.columns)
    for start in range(0, step.rows, chunk):
        weights = reader.read_float(step.source, slice(start, min(start + chunk, step.rows)))
        parts.append(k_quant(weights, step.bits, step.block_size, step.symmetric, importance))
        meter.advance(head_effort(step) * weights.shape[0] // step.rows)
    columns = zip(*parts, strict=True)
    write_linear(writer, step, Rounded(*(torch.cat(column) for column in columns)))


def _importance(work: _Work) -> torch.Tensor:
    """The mean square of what each column of the head sees, float32 (hidden,)."""
    seen = work.decoder.norm(work.states.read(0, work.states.places))
    return seen.view(-1, work.length, work.decoder.hidden).square().mean((0, 1)).clamp_min(1e-12)
