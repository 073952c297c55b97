"""What the files of a model say about it, before anything large is fetched.

Read are its configuration and the head of its README.md, from a folder or from the hub. The hub is
asked for a few kilobytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from phi3_mlflow.checkpoints import layout
from phi3_mlflow.checkpoints.configuration import DTYPE_KEYS, config_problems, key_value_heads
from phi3_mlflow.checkpoints.remote_code import CONFIGURATIONS, remote_code_problems
from phi3_mlflow.core.errors import CheckpointRefused, UserError, problem_list
from phi3_mlflow.sources.hub_access import endpoint, hub_transfer, offline
from phi3_mlflow.sources.hub_listing import read_listing
from phi3_mlflow.sources.retrying import Deadline, RetryPolicy
from phi3_mlflow.sources.spec import FileSource, HubSource, SourceSpec

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_CARD = "README.md"
_LARGEST_CARD = 2_000_000  # bytes
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_SPDX = {"mit": "MIT", "apache-2.0": "Apache-2.0"}
_TIME_LIMIT_S = 60.0
_POLICY = RetryPolicy(attempts=3)


@dataclass(frozen=True)
class About:
    """A model as its own files describe it.

    Attributes:
        source: the line that names it in a profile; on the hub with the commit.
        name: what it is called.
        base_model: what it was made from by its card; None where that is not said.
        licence: an SPDX identifier, or the card's own word; None where that is not said.
        context_length: tokens.
        architecture: its sizes, as a profile has them.
        brings_code: whether its configuration leads to code of its own.
    """

    source: str
    name: str
    base_model: str | None
    licence: str | None
    context_length: int
    architecture: Mapping[str, Any] = field(default_factory=dict)
    brings_code: bool = False


def look_at(spec: SourceSpec, base_dir: Path) -> About | None:
    """Read what a model's files say about it.

    Args:
        spec: where the model is.
        base_dir: what a relative folder counts from.

    Returns:
        What they say; None for a source of which no single file can be read.

    Raises:
        UserError: there is no such model, or it is none that can be used; says everything that is
            wrong with its configuration.
        EnvironmentProblem: the hub does not answer.
    """
    if isinstance(spec, FileSource):
        folder = spec.directory(base_dir).absolute()
        return _about(f"file:{folder}", folder.name, _files_in(folder, spec.text))
    if isinstance(spec, HubSource):
        commit, files = _files_on_the_hub(spec)
        return _about(f"hf:{spec.repo}@{commit}", spec.repo, files)
    return None


def _files_in(folder: Path, source: str) -> dict[str, bytes]:
    if not folder.is_dir():
        raise UserError(f"{source}: there is no directory {folder}")
    try:
        return {
            name: (folder / name).read_bytes()
            for name in (*CONFIGURATIONS, _CARD)
            if (folder / name).is_file()
        }
    except OSError as error:
        raise UserError(f"{source}: {folder} cannot be read: {error.strerror}") from error


def _files_on_the_hub(spec: HubSource) -> tuple[str, dict[str, bytes]]:
    from huggingface_hub import hf_hub_url

    if offline():
        raise UserError(
            f"{spec.text}: its configuration can only be read online (HF_HUB_OFFLINE is set). "
            "Give a folder (file:DIR), or leave source out and write the line yourself."
        )
    files = {}
    with hub_transfer(spec, _POLICY, Deadline(_TIME_LIMIT_S, _POLICY)) as transfer:
        listing = read_listing(spec, transfer)
        for name in (*CONFIGURATIONS, _CARD):
            if name in listing.files:
                url = hf_hub_url(spec.repo, name, revision=listing.commit, endpoint=endpoint())
                largest = _LARGEST_CARD if name == _CARD else layout.LARGEST_SMALL_FILE
                files[name] = transfer.get(url, name, largest)
    return listing.commit, files


def _about(source: str, name: str, files: Mapping[str, bytes]) -> About:
    """Put together what the files say.

    Raises:
        CheckpointRefused: the configuration is not one of a model that can be used.
    """
    if layout.CONFIG not in files:
        raise CheckpointRefused(f"{source} has no {layout.CONFIG}")
    found = {key: layout.parse_json(files[key], key) for key in CONFIGURATIONS if key in files}
    config = found[layout.CONFIG]
    if problems := config_problems(config):
        raise CheckpointRefused(problem_list(f"{source} cannot be used", problems))
    card = front_matter(files.get(_CARD, b""))
    licence = _first_text(card.get("license"))
    if licence == "other":
        licence = _first_text(card.get("license_name")) or licence
    return About(
        source=source,
        name=name,
        base_model=_first_text(card.get("base_model")),
        licence=_SPDX.get(licence, licence) if licence else None,
        context_length=int(config["max_position_embeddings"]),
        architecture=_sizes(config),
        brings_code=bool(remote_code_problems(found)),
    )


def _sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes: dict[str, Any] = {name: config[name] for name in names}
    sizes |= {"num_key_value_heads": key_value_heads(config), "vocab_size": config["vocab_size"]}
    if config.get("tie_word_embeddings"):
        sizes["tie_word_embeddings"] = True
    dtype = next((config[key] for key in DTYPE_KEYS if config.get(key)), None)
    # Without a dtype safetensors' headers decide, and the profile's default stands.
    return sizes | ({"dtype": _DTYPES[dtype]} if dtype in _DTYPES else {})


def front_matter(card: bytes) -> dict[str, Any]:
    """The YAML between two lines `---` that a model's README.md begins with; empty where none is.

    Whatever else it may be, it is no reason to refuse the model.
    """
    import yaml

    text = card[:_LARGEST_CARD].decode("utf-8", errors="replace")
    head, _, rest = text.removeprefix("\ufeff").partition("\n")
    if head.rstrip() != "---":
        return {}
    lines = []
    for line in rest.splitlines():
        if line.rstrip() == "---":
            break
        lines.append(line)
    try:
        found = yaml.safe_load("\n".join(lines))
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _first_text(value: Any) -> str | None:
    """A text, or the first text of a list; what is empty or goes over lines is none."""
    if isinstance(value, list):
        value = value[0] if value else None
    return value if isinstance(value, str) and value.strip() and value.isprintable() else None
