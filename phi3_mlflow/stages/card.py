"""The model card of a version: what it is, where it came from, what may be done with it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import yaml

from phi3_mlflow.evaluation.load import SPEEDS
from phi3_mlflow.evaluation.metrics import headline
from phi3_mlflow.tracking.registry import NOT_GATED
from phi3_mlflow.tracking.runs import without_folders

if TYPE_CHECKING:
    from collections.abc import Mapping

    from phi3_mlflow.config.profile import Profile

_ALGORITHMS = {
    "none": "none: the weights are as published",
    "rtn": "int4, rounded to the nearest step",
    "k_quant": "int4, scale and zero point of every block searched for the least error",
    "k_quant_mixed": "int4 by k-quant, int8 in the matrices where it pays",
    "gptq": "int4 by GPTQ: rounding errors made good by later columns, on calibration texts",
}


def model_card(
    profile: Profile,
    tags: Mapping[str, str],
    figures: Mapping[str, float] | None = None,
    hardware: str = "",
    uri: str = "",
    report: str = "",
    disturbed: str = "",
) -> str:
    """The card as Markdown.

    Args:
        profile: what the model is.
        tags: the version's tags.
        figures: what was measured, once it has been.
        hardware: what it was measured on.
        uri: of the version, once it has one.
        report: where the report on it is, as Markdown.
        disturbed: how speeds were measured, if that says too little about the model to show them.
    """
    algorithm = tags.get("algorithm", "none")
    lines = [
        _in_a_line(profile, tags),
        "",
        f"## {profile.name}",
        "",
        profile.description,
        "",
        f"- **Base model**: {profile.base_model}",
        f"- **Licence**: {profile.licence}",
        f"- **Training data**: {profile.training_data}",
        *_fine_tuning(tags),
        f"- **Context**: {profile.context_length:,} tokens",
        f"- **Source**: `{without_folders(tags.get('source', profile.origin))}` at revision "
        f"`{tags.get('source_revision', 'unknown')}`",
        f"- **Flavor**: {tags.get('flavor', profile.flavor)}",
        f"- **Precision**: {tags.get('precision', profile.precision)}",
        f"- **Quantization**: {_ALGORITHMS.get(algorithm, algorithm)}",
        f"- **Artifact**: sha256 `{tags.get('artifact_sha256', 'unknown')}`",
        f"- **Code**: commit `{tags.get('git_commit', 'unknown')}`",
        "",
        "**Intended use**: chat and instruction following in English, through MLflow's chat "
        "request. Answers can be wrong and must be checked where that matters; the limits of the "
        "base model apply.",
    ]
    lines += _verdict(tags)
    if report:
        lines += ["", f"**Report**: {report}"]
    if disturbed:
        figures = {name: value for name, value in (figures or {}).items() if name not in SPEEDS}
        hardware += f". Speed is left out: it was {disturbed}"
    if figures:
        lines += ["", "| measured | value |", "|---|---|"]
        lines += [f"| {name} | {text} |" for name, text in headline(figures)]
        if hardware:
            lines += ["", f"Measured on {hardware}."]
    if uri:
        lines += _how_to_use(profile, uri)
    return "\n".join(lines) + "\n"


def front_matter(profile: Profile, tags: Mapping[str, str]) -> str:
    """What the Hugging Face Hub reads at the head of a model card, as YAML between two lines.

    It belongs into the file `model_card.md`; in the registry, whose lists show the first line of a
    description, it would hide what the version is. Keys whose value is not known are left out.

    Args:
        profile: what the model is.
        tags: the version's tags.
    """
    onnx = tags.get("flavor", profile.flavor) != "transformers"
    precision = tags.get("precision", profile.precision)
    rounded = tags.get("algorithm", "none") != "none"
    tuned = "adapter_sha256" in tags
    head: dict[str, Any] = {"license": profile.licence.lower()}
    if not re.fullmatch(r"[a-z0-9.+-]+", head["license"]):
        head = {"license": "other", "license_name": profile.licence}
    if re.fullmatch(r"[\w.-]+/[\w.-]+", profile.base_model):  # as the hub names models
        head["base_model"] = profile.base_model
        if relation := "finetune" if tuned else "quantized" if rounded else None:
            head["base_model_relation"] = relation
    head |= {"pipeline_tag": "text-generation", "library_name": "onnx" if onnx else "transformers"}
    head["tags"] = [
        "mlflow",
        "conversational",
        *(["onnxruntime-genai"] if onnx else []),
        *([precision] if rounded else []),
        *(["lora"] if tuned else []),
    ]
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n\n"


def _in_a_line(profile: Profile, tags: Mapping[str, str]) -> str:
    """What the version is: all that a list of versions shows of its description."""
    precision = tags.get("precision", profile.precision)
    algorithm = tags.get("algorithm", "none")
    weights = precision if algorithm == "none" else f"{precision} by {algorithm}"
    tuned = ", fine-tuned" if "adapter_sha256" in tags else ""
    return f"{profile.base_model}{tuned}, {weights}, flavor {tags.get('flavor', profile.flavor)}"


def _how_to_use(profile: Profile, uri: str) -> list[str]:
    chat = '{"messages": [{"role": "user", "content": "Hello!"}]}'
    asked = '{"prompt": "Hello!"}' if profile.contract == "prompt" else chat
    return [
        "",
        "**Use**",
        "",
        "```python",
        f'model = mlflow.pyfunc.load_model("{uri}")',
        f"model.predict({asked})",
        "```",
    ]


def _verdict(tags: Mapping[str, str]) -> list[str]:
    """What the gate said, once it was asked."""
    if "gate" not in tags:
        return []
    reasons = tags.get("gate_reasons", "").splitlines()
    gate = tags["gate"]
    if gate != NOT_GATED:
        gate += f", {tags['gate_decision']}" if "gate_decision" in tags else ""
    elif reasons:  # the reason begins with the words
        return ["", f"**Gate**: {reasons[0]}"]
    said = [f"**Gate**: {gate}{': ' + reasons[0] if len(reasons) == 1 else ''}"]
    return ["", *said, *(["", *(f"- {reason}" for reason in reasons)] if len(reasons) > 1 else [])]


def _fine_tuning(tags: Mapping[str, str]) -> list[str]:
    """A line on what the version was trained on, where it was."""
    if "adapter_sha256" not in tags:
        return []
    logged_as = tags.get("logged_as", "merged")
    form = ", logged as the checkpoint before training with the adapter beside it"
    return [
        f"- **Fine-tuned**: LoRA on {tags.get('trained_on', 'rows of its own')}; rows sha256 "
        f"`{tags.get('data_sha256', 'unknown')}`, adapter sha256 `{tags['adapter_sha256']}`"
        f"{form if logged_as == 'adapter' else ''}"
    ]
