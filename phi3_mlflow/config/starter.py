"""A first profile for a model of one's own, with the choices that there are as comments."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import yaml

from phi3_mlflow.config.loading import load_profile
from phi3_mlflow.sources.about import About

if TYPE_CHECKING:
    from collections.abc import Mapping

_EXAMPLE = "phi-3-mini-4k"
EXAMPLE_SOURCE = "hf:microsoft/Phi-3-mini-4k-instruct@0a67737cc96d2554230f90338b163bc6380a2a85"
"""Of the example, known without reading its profile."""

_TEMPLATE = """\
# A model and what is to become of it. A line that begins with "#" and a key is a choice: take the
# "#" away to make it. All keys, with their defaults: docs/profiles.md.

# Which model is it? This is for its card in the registry, where it has the name of this file.
description: {description}
base_model: {base_model}
licence: {licence}{licence_remark}

# Where is it? A repository on the Hugging Face Hub, at a commit:
#     hf:OWNER/NAME@COMMIT
# or a folder with config.json, tokenizer.json and *.safetensors, as save_pretrained writes it:
#     file:/path/to/folder
# or a model that MLflow has:
#     models:/NAME@ALIAS    runs:/RUN_ID/PATH    s3://BUCKET/PATH
source: {source}
{remote_code}context_length: {context_length}{context_remark}
{architecture}
# How small? k_quant_mixed needs no texts and is quick. gptq is calibrated with texts, takes many
# times as long, and stays closer to full precision. precision: fp32 quantizes nothing.
precision: int4
quantization:
  algorithm: k_quant_mixed

# Are there rows to fine-tune it on? A .jsonl, .csv or .parquet file, or a folder of them, with the
# columns prompt and completion, or messages. See docs/training.md.
{train}
# Which questions must it answer? A file with the columns prompt and answer. Without one it is asked
# those that come with the project. See docs/evaluation.md.
{evaluation}
# How good must it be to replace the champion? Left out, the defaults of docs/evaluation.md count.
#gate:
#  thresholds:
#    accuracy: {{min: 0.6}}
#    kl_mean: {{max: 0.15}}
#    top1_agreement: {{min: 0.85}}
"""

_UNSTATED = "  # by which licence? Its README.md does not say"
_UNREAD = "  # its config.json was not read: max_position_embeddings there"


def example() -> About:
    """A model to begin with: what its shipped profile says of it."""
    profile = load_profile(_EXAMPLE)
    sizes = profile.architecture
    return About(
        source=profile.source,
        name=profile.base_model,
        base_model=None,
        licence=profile.licence,
        context_length=profile.context_length,
        architecture=sizes.model_dump(exclude_defaults=True) if sizes else {},
        brings_code=profile.remote_code == "drop",
    )


def starter(about: About | None, *, source: str, data: str | None, questions: str | None) -> str:
    """The text of a first profile.

    Args:
        about: what the model's files say; None where they were not read.
        source: the line that names the model, where they were not read.
        data: rows to fine-tune on.
        questions: a file of questions.

    Returns:
        A YAML file; whoever writes it has to load it before, as `load_profile` does.
    """
    name = about.name if about else source
    made_from = f", made from {about.base_model}" if about and about.base_model else ""
    licence = about.licence if about else None
    sizes = about.architecture if about else {}
    code = "remote_code: drop    # it names code of its own; transformers has the architecture\n"
    return _TEMPLATE.format(
        description=_scalar(f"{name}{made_from}."),
        base_model=_scalar(name),
        licence=_scalar(licence or "not stated"),
        licence_remark="" if licence else _UNSTATED,
        source=_scalar(about.source if about else source),
        remote_code=code if about and about.brings_code else "",
        context_length=about.context_length if about else 4096,
        context_remark="" if about else _UNREAD,
        architecture=_architecture(sizes),
        train=_section("train", "data", data, "/path/to/rows.jsonl"),
        evaluation=_section("evaluation", "questions", questions, "/path/to/questions.csv"),
    )


def _scalar(text: str) -> str:
    """A text as YAML has it, quoted where it has to be."""
    return yaml.safe_dump(text, width=10_000, allow_unicode=True).removesuffix("...\n").strip()


def _architecture(sizes: Mapping[str, Any]) -> str:
    """The section `architecture` for a known model, over lines of readable length."""
    if not sizes:
        return ""
    flow = yaml.safe_dump(dict(sizes), default_flow_style=True, sort_keys=False, width=10_000)
    lines = textwrap.wrap(flow.strip(), 96, initial_indent="  ", subsequent_indent="   ")
    remark = "# Its sizes, so that the memory and time a run needs are said before a download."
    return "\n".join([remark, "architecture:", *lines, ""])


def _section(section: str, key: str, value: str | None, example: str) -> str:
    """A section with one key: as it was given, or as a choice to be made."""
    if value is None:
        return f"#{section}:\n#  {key}: {example}\n"
    return f"{section}:\n  {key}: {_scalar(value)}\n"
