"""Every parameter of every entry point, once: its name, default, meaning and profile key.

`MLproject` and the README's table repeat the names and defaults; a test compares them with this
list. MLproject has neither booleans nor nulls and checks no types, so everything arrives as text
here, and `auto` stands for "as the profile says" or "what the preceding step left".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from phi3_mlflow.config.loading import find_profile, load_profile
from phi3_mlflow.core.errors import UserError, problem_list

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from phi3_mlflow.config.profile import Profile

AUTO = "auto"


@dataclass(frozen=True)
class Parameter:
    """One parameter.

    Attributes:
        name: as in `-P NAME=value`; a script's option is the same with hyphens.
        help: what it means, for `--help` and the README.
        default: as in MLproject.
        profile_key: the dotted profile key it overrides, if it does.
        number: it is a whole number; what is not one is left to the profile's check.
        choices: the only values allowed, where that is known without the profile.
    """

    name: str
    help: str
    default: str = AUTO
    profile_key: str | None = None
    choices: tuple[str, ...] = ()
    number: bool = False

    @property
    def option(self) -> str:
        """The script's option."""
        return "--" + self.name.replace("_", "-")


_ALL = (
    Parameter("profile", "a name in configs/, or the path of a YAML file", "smollm2-135m"),
    Parameter("source", "where the checkpoint comes from", profile_key="source"),
    Parameter("time_limit_s", "seconds that the download may take", profile_key="time_limit_s"),
    Parameter("lock", "a file to write the pinned source and the hashes of its files to"),
    Parameter("flavor", "onnx, transformers or both", profile_key="flavor"),
    Parameter("contract", "chat, or prompt (ONNX flavor only)", profile_key="contract"),
    Parameter("precision", "int4 or fp32, of the ONNX flavor", profile_key="precision"),
    Parameter("algorithm", "how int4 weights are rounded: rtn, k_quant, k_quant_mixed, gptq, or "
              "search, which tries the profile's candidates", profile_key="quantization.algorithm"),
    Parameter("block_size", "weights that share a scale", profile_key="quantization.block_size",
              number=True),
    Parameter("data", "rows to fine-tune on, .jsonl, .csv or .parquet, or a folder of them",
              profile_key="train.data"),
    Parameter("registered_model", "name in the Model Registry", profile_key="registered_model"),
    Parameter("size", "evaluation sets: quick or full", profile_key="evaluation.size"),
    Parameter("questions", "a file of questions of your own", profile_key="evaluation.questions"),
    Parameter("checkpoint", "a checkpoint's folder; auto: what the step before it left"),
    Parameter("base", "the checkpoint before fine-tuning, its folder; auto: what fetch left"),
    Parameter("onnx", "an ONNX model's folder; auto: what export left"),
    Parameter("model_uri", "a model's URI; verify: also a folder or a version's number; auto: what "
              "log left, for score, serve and verify the champion"),
    Parameter("keys", "verify: files of public keys in PEM, with commas; auto: the profile's"),
    Parameter("rebuild", "verify: true: make the version again as well, and compare the bytes",
              "false", choices=("true", "false")),
    Parameter("version", "a version's number or models:/ URI; auto: the alias challenger"),
    Parameter("action", "promote, or rollback to the champion before", "promote",
              choices=("promote", "rollback")),
    Parameter("overrule", "true: move the alias in spite of the gate", "false",
              choices=("true", "false")),
    Parameter("force", "true: do it again although the output is there; main also takes all, or "
              "the name of a step", "false"),
    Parameter("input", "score: the file of rows, .jsonl, .csv or .parquet; has to be given"),
    Parameter("output", "the file to write: score, of the input's format; init, a profile, auto: "
              "my-model.yaml; verify, what was found as JSON, auto: none"),
    Parameter("engine", "score: local, or spark (Apache Spark)", "local",
              choices=("local", "spark")),
    Parameter("master", "score on Spark: local[N], spark://HOST:PORT, yarn; auto: this machine"),
    Parameter("workers", "processes with a model each; auto: as many as cores and memory take"),
    Parameter("max_failed", "score: rows that may fail, a number or as 5%; auto: any"),
    Parameter("batch_size", "score: rows handed to a worker, and kept, together; auto: 16"),
    Parameter("max_tokens", "new tokens of an answer; auto: as the model says"),
    Parameter("temperature", "0 to 2, 0 takes the likeliest token; auto: as the model says"),
    Parameter("top_p", "0 to 1; auto: as the model says"),
    Parameter("seed", "of the random numbers; auto: drawn, and kept with the output"),
    Parameter("do", "what to do with the cache: list, size, verify or prune", "list",
              choices=("list", "size", "verify", "prune")),
    Parameter("older_than", "prune: what was not used for so long, as 12h, 30d or 8w"),
    Parameter("max_size", "prune: the longest unused until the rest fits, as 500MB or 20GB"),
    Parameter("host", "serve: address to listen on; any but this machine's own needs an API key",
              "127.0.0.1"),
    Parameter("port", "serve: port to listen on; 0 takes a free one", "8000"),
    Parameter("running", "serve: requests answered at the same time", "8"),
    Parameter("batch", "requests or rows computed together; 1: in turns, as predict computes them; "
              "auto: serve as many as `running`, score 8"),
    Parameter("waiting", "serve: requests that may wait; more are told to come again (429)", "32"),
    Parameter("request_limit_s", "serve: seconds a request may take, its wait included", "300"),
    Parameter("body_limit_kb", "serve: kilobytes that a request may have", "1000"),
    Parameter("trace", "serve: requests as MLflow traces, without their texts or in full", "off",
              choices=("off", "figures", "full")),
    Parameter("dry_run", "true: say what would be done, and why, and do nothing", "false",
              choices=("true", "false")),
    Parameter("quiet", "true: no progress, only the summary line and errors", "false",
              choices=("true", "false")),
)  # fmt: skip
PARAMETERS: Mapping[str, Parameter] = {parameter.name: parameter for parameter in _ALL}

T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """What somebody asked an entry point for.

    Attributes:
        profile: with the overrides laid over it.
        values: the parameters, as given; what is not given has its default.
        results: what the steps before made, by parameter name, when `main` does the asking.
    """

    profile: Profile
    values: Mapping[str, str]
    results: Mapping[str, object] = field(default_factory=dict)

    def value(self, name: str) -> str:
        """A parameter's text."""
        return self.values.get(name, PARAMETERS[name].default)

    def is_auto(self, name: str) -> bool:
        """Whether a parameter is left to the profile, or to what the step before made."""
        return self.value(name) == AUTO

    def flag(self, name: str) -> bool:
        """Whether a parameter that is true or false is true."""
        return self.value(name) == "true"

    def handed(self, name: str, kind: type[T]) -> T | None:
        """What a step before handed over for a parameter, or None when nothing was.

        Raises:
            TypeError: it is of another kind; the sequence is wrong.
        """
        result = self.results.get(name)
        if result is not None and not isinstance(result, kind):
            raise TypeError(f"{name}: expected {kind.__name__}, found {type(result).__name__}")
        return result

    @property
    def base_directory(self) -> Path:
        """What a relative path in the profile counts from: the folder of the profile's file."""
        return find_profile(self.value("profile")).absolute().parent


def read_request(
    names: Iterable[str],
    values: Mapping[str, str],
    choices: Mapping[str, tuple[str, ...]] | None = None,
) -> Request:
    """Check a step's parameters and lay them over the profile.

    Args:
        names: the parameters that the step has.
        values: name to text, as given; what is not given has its default.
        choices: allowed values that depend on the step.

    Raises:
        UserError: everything that is wrong, in one message.
    """
    allowed = {name: PARAMETERS[name] for name in names}
    problems = [
        f"parameter: unknown name {name!r}; this step has {', '.join(allowed)}"
        for name in values
        if name not in allowed
    ]
    overrides: dict[str, str | int] = {}
    for name, parameter in allowed.items():
        value = values.get(name, parameter.default)
        valid = (choices or {}).get(name, parameter.choices)
        if valid and value not in valid:
            problems.append(f"parameter: {name} = {value!r}: allowed: {', '.join(valid)}")
        elif not value.strip():
            problems.append(f"parameter: {name} is empty; leave it out, or give {AUTO}")
        elif parameter.profile_key and value != AUTO:
            whole = parameter.number and value.isdecimal()
            overrides[parameter.profile_key] = int(value) if whole else value
    name_or_path = values.get("profile", PARAMETERS["profile"].default)
    if not name_or_path.strip():
        raise UserError(problem_list("These parameters are wrong", problems))
    return Request(load_profile(name_or_path, overrides, problems), dict(values))
