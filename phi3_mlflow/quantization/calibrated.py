"""Quantize a checkpoint with calibration texts, one decoder layer in memory at a time.

The texts' hidden states are carried from layer to layer through what has been quantized already, so
that every matrix is rounded for the inputs it will really get. Within a layer the four matrices are
done in the order of the computation: qkv_proj, o_proj, gate_up_proj, down_proj.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from phi3_mlflow.quantization.calibration import calibration_sequences
from phi3_mlflow.quantization.gptq import gptq
from phi3_mlflow.quantization.matrices import CHUNK_WEIGHTS, copy_tensor, write_linear
from phi3_mlflow.quantization.packing import dequantize
from phi3_mlflow.quantization.plan import EMBEDDING, HEAD, CopyPlan, LinearPlan, QuantizationPlan
from phi3_mlflow.quantization.rounding import Rounded, k_quant, rtn

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from phi3_mlflow.checkpoints.reader import CheckpointReader
    from phi3_mlflow.checkpoints.writer import CheckpointWriter
    from phi3_mlflow.core.progress import Meter
    from phi3_mlflow.quantization.calibration import Conversation
    from phi3_mlflow.quantization.settings import GptqSettings

# Sequences that go through a layer together.
_BATCH = 4


def quantize_calibrated(
    checkpoint: Path,
    reader: CheckpointReader,
    plan: QuantizationPlan,
    settings: GptqSettings,
    writer: CheckpointWriter,
    meter: Meter,
    rows: Sequence[Conversation] = (),
) -> int:
    """Quantize by GPTQ, layer by layer.

    Args:
        checkpoint: its directory, for the config and the tokenizer.
        reader: its tensors.
        plan: what becomes of them; `steps` are in the order of the computation.
        settings: with `calibration`.
        writer: gets the tensors.
        meter: told the bytes of the source that are done.
        rows: training rows to calibrate with besides the texts.

    Returns:
        The bytes written.

    Raises:
        UserError: the calibration file cannot be used.
    """
    with torch.inference_mode(), _threads(settings.threads):
        states = _embed(reader, calibration_sequences(checkpoint, settings, rows))
        model = _Layers(checkpoint, reader)
        if settings.drift_correction:
            model.reference = states.clone()
        written = 0
        for layer, steps in _by_layer(plan):
            if layer is None:
                for step in steps:
                    written += _outside(reader, step, model, states, settings, writer, meter)
                continue
            done = model.quantize(layer, steps, states, settings)
            for step in steps:
                if isinstance(step, CopyPlan):
                    written += copy_tensor(reader, step, writer, meter)
                else:
                    written += write_linear(writer, step, done.pop(step.name))
                    meter.advance(reader.entry(step.source).nbytes)
        return written


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


def _embed(reader: CheckpointReader, sequences: torch.Tensor) -> torch.Tensor:
    """Hidden states float32 (sequences, tokens, hidden) of token ids (sequences, tokens)."""
    table = reader.read(EMBEDDING)
    return table[sequences].to(torch.float32)


class _Layers:
    """Builds one decoder layer at a time and runs the calibration states through it."""

    def __init__(self, checkpoint: Path, reader: CheckpointReader) -> None:
        from transformers import Phi3Config
        from transformers.models.phi3.modeling_phi3 import Phi3RMSNorm, Phi3RotaryEmbedding

        self._reader = reader
        self._config = Phi3Config.from_pretrained(str(checkpoint))
        self._config._attn_implementation = "sdpa"
        self._rotary = Phi3RotaryEmbedding(self._config)
        self._norm = Phi3RMSNorm(self._config.hidden_size, self._config.rms_norm_eps)
        # States of the full-precision model, carried along where drift is corrected.
        self.reference: torch.Tensor | None = None

    def quantize(
        self,
        layer: int,
        steps: list[LinearPlan | CopyPlan],
        states: torch.Tensor,
        settings: GptqSettings,
    ) -> dict[str, Rounded]:
        """Quantize the four matrices of a layer; `states` go through it and are overwritten."""
        module = self._load(layer)
        full = self._load(layer) if self.reference is not None else None
        plans = {s.name.rsplit(".", 1)[-1]: s for s in steps if isinstance(s, LinearPlan)}
        done: dict[str, Rounded] = {}

        def round_matrix(linear: torch.nn.Linear, name: str, inputs: Any, ideal: Any) -> None:
            step = plans[name]
            rounded = _round(linear.weight.data, inputs, ideal, step, settings)
            done[step.name] = rounded
            linear.weight.data = dequantize(*rounded, step.block_size)

        inputs, ideal = _attention_inputs(module, states), _attention_inputs(full, self.reference)
        round_matrix(module.self_attn.qkv_proj, "qkv_proj", inputs, ideal)
        inputs, ideal = self._attend(module, inputs), self._attend(full, ideal)
        round_matrix(module.self_attn.o_proj, "o_proj", inputs, ideal)
        _add(states, module.self_attn.o_proj, inputs)
        _add(self.reference, full and full.self_attn.o_proj, ideal)
        inputs, ideal = _mlp_inputs(module, states), _mlp_inputs(full, self.reference)
        round_matrix(module.mlp.gate_up_proj, "gate_up_proj", inputs, ideal)
        inputs, ideal = _activate(module, inputs), _activate(full, ideal)
        round_matrix(module.mlp.down_proj, "down_proj", inputs, ideal)
        _add(states, module.mlp.down_proj, inputs)
        _add(self.reference, full and full.mlp.down_proj, ideal)
        return done

    def final_norm(self, states: torch.Tensor) -> torch.Tensor:
        """What the head sees."""
        self._norm.weight.data = self._reader.read_float("model.norm.weight")
        normed: torch.Tensor = self._norm(states)
        return normed

    def _attend(self, module: Any, inputs: Any) -> Any:
        """What o_proj sees, from what qkv_proj sees."""
        if module is None:
            return None
        attention = module.self_attn
        output, attention.o_proj = attention.o_proj, torch.nn.Identity()
        positions = torch.arange(inputs.shape[1]).unsqueeze(0)
        rotary = self._rotary(inputs, positions)
        # Without a mask the attention is causal; the sequences are not padded.
        parts = [
            attention(part, position_embeddings=rotary, attention_mask=None)[0]
            for part in inputs.split(_BATCH)
        ]
        attention.o_proj = output
        return torch.cat(parts)

    def _load(self, layer: int) -> Any:
        from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer

        with torch.device("meta"):
            module = Phi3DecoderLayer(self._config, layer)
        prefix = f"model.layers.{layer}."
        tensors = {name: self._reader.read_float(prefix + name) for name in module.state_dict()}
        module.load_state_dict(tensors, assign=True)
        return module.eval()


def _attention_inputs(module: Any, states: Any) -> Any:
    return None if module is None else module.input_layernorm(states)


def _mlp_inputs(module: Any, states: Any) -> Any:
    return None if module is None else module.post_attention_layernorm(states)


def _activate(module: Any, inputs: Any) -> Any:
    """What down_proj sees, from what gate_up_proj sees."""
    if module is None:
        return None
    parts = []
    for part in inputs.split(_BATCH):
        gate, up = module.mlp.gate_up_proj(part).chunk(2, dim=-1)
        parts.append(module.mlp.activation_fn(gate).mul_(up))
    return torch.cat(parts)


def _add(states: Any, linear: Any, inputs: Any) -> None:
    if states is not None:
        for into, part in zip(states.split(_BATCH), inputs.split(_BATCH), strict=True):
            into += linear(part)


def _round(
    weights: torch.Tensor,
    inputs: torch.Tensor,
    ideal: torch.Tensor | None,
    step: LinearPlan,
    settings: GptqSettings,
) -> Rounded:
    if ideal is None and step.bits == 8:
        return rtn(weights, 8, step.block_size, step.symmetric)
    moments = second_moments(inputs)
    if ideal is not None:
        weights = correct_drift(
            weights, inputs, ideal, moments, settings.damping, settings.drift_correction
        )
    if step.bits == 8:
        return rtn(weights, 8, step.block_size, step.symmetric)
    return gptq(weights, moments, step.bits, step.block_size, step.symmetric, settings.damping)


def correct_drift(
    weights: torch.Tensor,
    inputs: torch.Tensor,
    ideal: torch.Tensor,
    moments: torch.Tensor,
    damping: float,
    share: float,
) -> torch.Tensor:
    """Adapt a matrix so that for inputs that have drifted it gives what the true ones give.

    The least-squares solution of `adapted @ inputs = weights @ ideal`, held near `weights` by the
    damping (the idea of GPTAQ, https://arxiv.org/abs/2504.02692, taken before the rounding).

    Args:
        weights: float32 (N, K).
        inputs: what the matrix gets in the quantized model, (..., K).
        ideal: what it gets in the full-precision model, the same shape.
        moments: `second_moments(inputs)`.
        damping: share of the mean diagonal added to the diagonal.
        share: 0 leaves the weights as they are, 1 goes all the way.
    """
    flat, drift = inputs.flatten(0, -2), (ideal - inputs).flatten(0, -2)
    cross = torch.zeros_like(moments)
    for some, part in zip(torch.split(drift, 2048), torch.split(flat, 2048), strict=True):
        cross.addmm_(some.T, part)
    damped = moments.clone()
    damped.diagonal().add_(max(damping * float(moments.diagonal().mean()), 1e-12))
    lower, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        return weights
    # adapted = weights + share * weights @ (cross / n) @ damped^-1
    step = torch.cholesky_solve((weights @ cross.div_(flat.shape[0])).T, lower).T
    return weights + share * step


def second_moments(inputs: torch.Tensor) -> torch.Tensor:
    """The mean of x x^T, float32 (K, K), over inputs (..., K)."""
    flat = inputs.reshape(-1, inputs.shape[-1])
    moments = torch.zeros((flat.shape[1], flat.shape[1]))
    for part in torch.split(flat, 2048):
        moments.addmm_(part.T, part)
    return moments.div_(flat.shape[0])


def _outside(
    reader: CheckpointReader,
    step: LinearPlan | CopyPlan,
    model: _Layers,
    states: torch.Tensor,
    settings: GptqSettings,
    writer: CheckpointWriter,
    meter: Meter,
) -> int:
    """Embedding, final norm and head."""
    del settings
    if isinstance(step, CopyPlan):
        return copy_tensor(reader, step, writer, meter)
    assert step.name == HEAD
    importance = None
    if step.bits == 4:
        importance = model.final_norm(states).square().mean((0, 1)).clamp_min(1e-12)
    parts = []
    chunk = max(8, CHUNK_WEIGHTS // step.columns)
    for start in range(0, step.rows, chunk):
        weights = reader.read_float(step.source, slice(start, min(start + chunk, step.rows)))
        parts.append(k_quant(weights, step.bits, step.block_size, step.symmetric, importance))
        meter.advance(reader.entry(step.source).nbytes * weights.shape[0] // step.rows)
    columns = zip(*parts, strict=True)
    return write_linear(writer, step, Rounded(*(torch.cat(column) for column in columns)))
