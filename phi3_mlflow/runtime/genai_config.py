"""What genai_config.json says of a model: its limits, its tokens, its graph."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Decoder:
    """The graph of a decoder.

    Attributes:
        filename: of the graph.
        provider: what the graph was built for, `cpu` or `cuda`.
        layers, heads: how many; heads are those of the keys and values.
        head_size: values of a head.
        window: tokens of the attention's window, 0 without one.
        layers_have_window: whether the graph has the window in its layers.
        input_ids, attention_mask, logits: names of values of the graph.
        cache: names of each input and output of key-value memory: keys and values, by layer.
    """

    filename: str
    provider: str
    layers: int
    heads: int
    head_size: int
    window: int
    layers_have_window: bool
    input_ids: str
    attention_mask: str
    logits: str
    cache: tuple[tuple[str, str], ...]

    @property
    def token_values(self) -> int:
        """Numbers that the keys and values of one token are."""
        return 2 * self.layers * self.heads * self.head_size

    @classmethod
    def read(cls, about: dict[str, Any]) -> Decoder:
        """Read `model.decoder` of the file."""
        inputs, outputs = about.get("inputs", {}), about.get("outputs", {})
        window = about.get("sliding_window") or {}
        providers = about.get("session_options", {}).get("provider_options", [])
        return cls(
            filename=about.get("filename", "model.onnx"),
            provider="cuda" if any("cuda" in options for options in providers) else "cpu",
            layers=about["num_hidden_layers"],
            heads=int(about["num_key_value_heads"]),
            head_size=int(about["head_size"]),
            window=window.get("window_size", 0),
            layers_have_window=bool(window.get("layers")),
            input_ids=inputs.get("input_ids", "input_ids"),
            attention_mask=inputs.get("attention_mask", "attention_mask"),
            logits=outputs.get("logits", "logits"),
            cache=tuple(
                (
                    inputs.get(f"past_{kind}_names", f"past_key_values.%d.{kind}") % layer,
                    outputs.get(f"present_{kind}_names", f"present.%d.{kind}") % layer,
                )
                for layer in range(about["num_hidden_layers"])
                for kind in ("key", "value")
            ),
        )


@dataclass(frozen=True)
class GenaiConfig:
    """A model that onnxruntime-genai's model builder made.

    Attributes:
        context: tokens that it was made for, prompt and answer together.
        ends: tokens that end a turn.
        decoder: its graph.
    """

    context: int
    ends: frozenset[int]
    decoder: Decoder

    @classmethod
    def read(cls, folder: Path) -> GenaiConfig:
        """Read genai_config.json of a folder."""
        about = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
        ends = about["eos_token_id"]
        return cls(
            context=int(about["context_length"]),
            ends=frozenset(ends if isinstance(ends, list) else [ends]),
            decoder=Decoder.read(about["decoder"]),
        )
