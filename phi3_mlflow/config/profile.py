"""A profile: everything that decides what a run of the pipeline produces, as one YAML file.

Profile file < entry-point parameters. All that is wrong with either is reported in one message,
before any work.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import (
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from phi3_mlflow.core.errors import UserError, problem_list
from phi3_mlflow.core.section import Section
from phi3_mlflow.evaluation.settings import EvaluationSettings, GateSettings
from phi3_mlflow.flavors.settings import RuntimeSettings
from phi3_mlflow.quantization.settings import QuantizationSettings, SearchSettings
from phi3_mlflow.sources.spec import HubSource, parse_source

PROFILE_DIRECTORY = Path(__file__).resolve().parents[2] / "configs"

CALIBRATION = PROFILE_DIRECTORY.parent / "data" / "calibration.jsonl"
_FOR_EVERY_ALGORITHM = ("algorithm", "block_size", "head", "embedding", "accuracy_level")

Flavor = Literal["onnx", "transformers", "both"]
Precision = Literal["int4", "fp32"]
Contract = Literal["chat", "prompt"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Profile(Section):
    """One model and what is to become of it."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str
    base_model: str = Field(description="the model's name where it was published")
    licence: str = Field(description="SPDX identifier of the model's licence")
    training_data: str = Field(default="not stated", description="the publisher's statement")
    track: str | None = Field(
        default=None,
        description="a branch on the hub to follow, in the place of the source's @REVISION",
    )
    source: str
    sha256: dict[str, Sha256] = Field(
        default_factory=dict, description="file name: hash that the source must deliver"
    )
    remote_code: Literal["refuse", "drop"] = Field(
        default="refuse",
        description="a configuration that leads to code: refuse it, or drop what leads there",
    )
    time_limit_s: float = Field(default=6 * 3600, gt=0, description="seconds a fetch may take")
    context_length: int = Field(ge=16, description="tokens")
    flavor: Flavor = "onnx"
    contract: Contract = "chat"
    precision: Precision = "int4"
    registered_model: str = Field(pattern=r"^[^/:@]+$", description="default: the profile's name")
    quantization: QuantizationSettings = QuantizationSettings()
    search: SearchSettings = SearchSettings()
    runtime: RuntimeSettings = RuntimeSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    gate: GateSettings = GateSettings()

    @field_validator("source")
    @classmethod
    def _source_parses(cls, value: str, info: ValidationInfo) -> str:
        branch = info.data.get("track")
        if branch is not None and not value.strip().startswith("hf:"):
            raise ValueError(
                f"track '{branch}' follows a branch on the hub, so it needs a source "
                "hf:OWNER/NAME; leave track out for any other"
            )
        if branch is not None and "@" in value:
            raise ValueError(
                f"track '{branch}' takes the place of what is after @; leave out one of the two"
            )
        try:
            spec = parse_source(_at(value, branch))
        except UserError as error:
            raise ValueError(str(error)) from error
        if branch is not None and isinstance(spec, HubSource) and spec.pinned:
            raise ValueError(f"track '{branch}' is a commit, which does not move; write it after @")
        return value

    @model_validator(mode="after")
    def _possible(self) -> Profile:
        if self.contract == "prompt" and self.flavor != "onnx":
            raise ValueError(
                f"contract 'prompt' needs flavor 'onnx', found flavor '{self.flavor}'; "
                "the transformers flavor answers the chat contract only"
            )
        judge = self.evaluation.judge
        judges = {metric for metric in self.gate.thresholds if metric.startswith("judge.")}
        if unknown := sorted(judges - set(judge.metrics if judge else ())):
            known = ", ".join(judge.metrics) if judge else "none: evaluation.judge is not set"
            raise ValueError(
                f"gate.thresholds: no judge gives {', '.join(unknown)}; known: {known}"
            )
        if self.track is not None and self.sha256:
            raise ValueError(
                f"track '{self.track}' follows a branch whose files change, and sha256 pins them; "
                "leave out one of the two"
            )
        if self.runtime.max_context and self.runtime.max_context > self.context_length:
            raise ValueError(
                f"runtime.max_context {self.runtime.max_context} is beyond the model's "
                f"context_length {self.context_length}"
            )
        return self

    @property
    def origin(self) -> str:
        """The source as `parse_source` reads it, with the branch that is followed."""
        return _at(self.source, self.track)

    @property
    def makes_onnx(self) -> bool:
        """Whether an ONNX directory is part of what this profile produces."""
        return self.flavor in ("onnx", "both")

    @property
    def quantizes(self) -> bool:
        return self.makes_onnx and self.precision == "int4"


def _at(source: str, branch: str | None) -> str:
    return source if branch is None else f"{source.strip()}@{branch}"


def profile_names() -> list[str]:
    """The profiles that come with the project."""
    return sorted(file.stem for file in PROFILE_DIRECTORY.glob("*.yaml"))


def find_profile(name_or_path: str) -> Path:
    """The file of a profile, given its name in `configs/` or its path.

    Raises:
        UserError: there is no such profile; the message names those there are.
    """
    looks_like_path = name_or_path.endswith((".yaml", ".yml")) or "/" in name_or_path
    file = (
        Path(name_or_path).expanduser()
        if looks_like_path
        else PROFILE_DIRECTORY / f"{name_or_path}.yaml"
    )
    if file.is_file():
        return file
    if looks_like_path:
        raise UserError(
            f"profile: there is no file {file.absolute()}\n"
            "Give an absolute path (a relative one counts from the project's folder), or one of "
            f"the names {', '.join(profile_names())}."
        )
    close = difflib.get_close_matches(name_or_path, profile_names(), n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise UserError(
        f"profile: there is no profile {name_or_path!r}.{hint}\n"
        f"Allowed: {', '.join(profile_names())}, or the path of a YAML file of your own."
    )


def load_profile(
    name_or_path: str,
    overrides: Mapping[str, str | int] | None = None,
    problems: Sequence[str] = (),
) -> Profile:
    """Read a profile and lay the entry-point parameters over it.

    Args:
        name_or_path: a name in `configs/`, or the path of a YAML file.
        overrides: dotted profile key to value.
        problems: what is already known to be wrong elsewhere, to be reported in the same message.

    Raises:
        UserError: everything that is wrong with the file and the overrides, and what is allowed.
    """
    overrides = overrides or {}
    try:
        file = find_profile(name_or_path)
    except UserError as error:
        if problems:
            raise UserError(
                problem_list("These parameters are wrong", [*problems, str(error)])
            ) from error
        raise
    content = _read_yaml(file)
    content.setdefault("name", file.stem)
    content.setdefault("registered_model", content["name"])
    _another_algorithm(content, overrides.get("quantization.algorithm"))
    if "@" in str(overrides.get("source", "")):  # a pin given for this run
        content.pop("track", None)
    for key, value in overrides.items():
        _lay_over(content, key, value)
    _search_instead(content, overrides.get("quantization.algorithm"))
    for chosen in _quantizations(content):
        _find_calibration(chosen, file)
    found: list[str] = list(problems)
    try:
        profile = Profile.model_validate(content)
    except ValidationError as error:
        found += [_describe(problem, file, overrides) for problem in error.errors()]
    if found:
        raise UserError(problem_list(f"Profile {name_or_path} cannot be used", found))
    return profile


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file.name} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file.name}: expected a mapping of keys, found {type(content).__name__}")
    return content


def _another_algorithm(content: dict[str, Any], algorithm: str | int | None) -> None:
    """Where a parameter chooses another algorithm, leave out what the file says for its own."""
    chosen = content.get("quantization")
    if algorithm is None or not isinstance(chosen, dict) or chosen.get("algorithm") == algorithm:
        return
    content["quantization"] = {k: v for k, v in chosen.items() if k in _FOR_EVERY_ALGORITHM}


def _search_instead(content: dict[str, Any], algorithm: str | int | None) -> None:
    """`quantization.algorithm: search` means: try the candidates. A parameter that names an
    algorithm means: do not."""
    chosen, search = content.get("quantization"), content.setdefault("search", {})
    if not isinstance(search, dict):
        return
    if isinstance(chosen, dict) and chosen.get("algorithm") == "search":
        content["quantization"], search["on"] = {}, True
    elif algorithm is not None:
        search["on"] = False


def _quantizations(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Every set of quantization settings in a profile file."""
    search = content.get("search")
    candidates = search.get("candidates") if isinstance(search, dict) else None
    found = [content.get("quantization")]
    found += list(candidates.values()) if isinstance(candidates, dict) else []
    return [chosen for chosen in found if isinstance(chosen, dict)]


def _find_calibration(chosen: dict[str, Any], file: Path) -> None:
    """GPTQ without texts takes the project's; a relative file counts from the profile's folder."""
    named = chosen.get("calibration")
    if isinstance(named, str):
        chosen["calibration"] = str(file.absolute().parent / Path(named).expanduser())
    elif named is None and chosen.get("algorithm") == "gptq":
        chosen["calibration"] = str(CALIBRATION)


def _lay_over(content: dict[str, Any], dotted: str, value: str | int) -> None:
    *path, last = dotted.split(".")
    for part in path:
        section = content.setdefault(part, {})
        if not isinstance(section, dict):  # reported by validation as a wrong type
            return
        content = section
    content[last] = value


def _describe(problem: Any, file: Path, overrides: Mapping[str, str | int]) -> str:
    """One problem as `where: key = value: what is wrong; what is allowed`."""
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    where = "parameter" if key in overrides else file.name
    if problem["type"] == "extra_forbidden":
        allowed = sorted(_fields_at(location[:-1]))
        close = difflib.get_close_matches(location[-1], allowed, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        return f"{where}: unknown key {key}; {hint}Allowed here: {', '.join(allowed)}"
    if problem["type"] == "missing":
        return f"{where}: {key} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    if not key:
        return f"{where}: {message}"
    value = problem["input"]
    shown = "" if isinstance(value, dict | list) else f" = {value!r}"
    return f"{where}: {key}{shown}: {message}"


def _fields_at(path: Sequence[str]) -> list[str]:
    """The keys allowed in the section at `path`."""
    model: Any = Profile
    for part in path:
        field = getattr(model, "model_fields", {}).get(part)
        if field is None:
            return []
        model = _model_in(field.annotation)
    return list(getattr(model, "model_fields", {}))


def _model_in(annotation: Any) -> Any:
    """The settings class in an annotation such as `X | None` or `dict[str, X]`."""
    if get_origin(annotation) in (Union, types.UnionType, dict, list):
        models = [_model_in(argument) for argument in get_args(annotation)]
        return next((m for m in models if hasattr(m, "model_fields")), None)
    return annotation
