"""What `main` says at its end: the verdict and why, the figures, the report, what to do next."""

from __future__ import annotations

import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from phi3_mlflow.config.loading import find_profile, profile_names
from phi3_mlflow.core import console
from phi3_mlflow.core.git import origin
from phi3_mlflow.core.shipped import checkout
from phi3_mlflow.evaluation.load import unsound
from phi3_mlflow.evaluation.metrics import headline
from phi3_mlflow.stages.evaluate import headline_metrics, report_file
from phi3_mlflow.tracking import registry
from phi3_mlflow.tracking.connection import is_server, tracking_identity

if TYPE_CHECKING:
    from phi3_mlflow.config.parameters import Request
    from phi3_mlflow.pipeline.step import Outcome
    from phi3_mlflow.stages.records import EvaluatedVersion, EvaluationRecord, PromotionRecord

_LONGEST_ANSWER = 240  # characters
_RULE = "-" * 78
_OF_ROUNDING = ("KL divergence", "same likeliest token", "perplexity", "kl_mean", "top1_agreement")
_OF_ENDING = ("endless_rate", "repetition_rate", "answers cut off", "answers that repeat")


def say_done(
    request: Request,
    evaluated: Outcome[EvaluationRecord],
    promoted: PromotionRecord,
    *,
    worked: bool,
) -> None:
    """Tell the person who started it what there is now, and what to do with it.

    Args:
        request: of `main`.
        evaluated: how the evaluation ended.
        promoted: what became of the alias.
        worked: any step had something to do.
    """
    name = request.profile.registered_model
    found = evaluated.record.challenger
    lines = ["", _RULE]
    if not worked and not promoted.moved:
        lines.append("Nothing to do: everything is as an earlier run left it.")
    state = "is the champion now" if promoted.moved else "is the champion"
    lines += [
        f"Gate: {found.verdict.told}",
        f"{promoted.champion} {state}{_why(promoted, found)}",
        f"Registered model  {name}",
        *_aliases(name),
        *_figures(evaluated),
        "Asked",
        f"  {found.sample.question}",
        f"  > {shortened(found.sample.answer)}",
        "Next",
        *(f"  {line}" for line in next_commands(request)),
    ]
    console.say("\n".join([*lines, _RULE]))


def say_refused(request: Request, evaluated: Outcome[EvaluationRecord]) -> None:
    """Tell the person who started it what was refused, and what to try.

    Args:
        request: of `main`.
        evaluated: how the evaluation ended.
    """
    record = evaluated.record
    uri, found = next(iter(record.versions.items()))
    lines = [
        "",
        _RULE,
        f"Refused: {uri}",
        *(f"  {reason}" for reason in found.verdict.reasons),
        *_aliases(request.profile.registered_model),
        *_figures(evaluated),
        "To try",
        *(f"  {line}" for line in what_to_try(request, found, registry.number_of(uri))),
    ]
    console.say("\n".join([*lines, _RULE]))


def shortened(answer: str) -> str:
    """An answer on one line, and not all of it when it is long."""
    text = " ".join(answer.split())
    return text if len(text) <= _LONGEST_ANSWER else f"{text[:_LONGEST_ANSWER].rstrip()} […]"


def what_to_try(request: Request, found: EvaluatedVersion, version: str) -> list[str]:
    """What may help against what a version was refused for, as commands where it is one."""
    profile = shlex.quote(_from_anywhere(request))
    reasons = " ".join(found.verdict.reasons)
    lines = []
    if any(words in reasons for words in _OF_ROUNDING) and request.profile.quantizes:
        lines.append(
            "another quantization:    " + _run(None, f"profile={profile}", "algorithm=search")
        )
    if any(words in reasons for words in _OF_ENDING):
        lines.append(
            "answers that never end:  look at them in the report; most often the end tokens in "
            "generation_config.json are not those that the chat template writes"
        )
    if request.profile.train is not None:
        lines.append("another training:        more rows, or other settings: docs/training.md")
    lines += [
        "measure on everything:   "
        + _run("evaluate", f"profile={profile}", f"version={version}", "size=full"),
        "other bounds:            section gate of the profile: docs/evaluation.md",
        "promote it all the same: "
        + _run("promote", f"profile={profile}", f"version={version}", "overrule=true"),
    ]
    return lines


def next_commands(request: Request) -> list[str]:
    """Commands to copy, with the programs of the environment this runs in."""
    store = tracking_identity()
    name, profile = request.profile.registered_model, shlex.quote(_from_anywhere(request))
    there = f"MLFLOW_TRACKING_URI={shlex.quote(store)}"
    look = (
        f"open {store} in a browser"
        if is_server(store)
        else f"{_mlflow()} ui --backend-store-uri {shlex.quote(store)}"
    )
    return [
        "look at it:       " + look,
        "serve it:         " + _run("serve", f"profile={profile}"),
        "  or with MLflow: " + f"{there} {_mlflow()} models serve "
        f"-m models:/{name}@champion --env-manager local -p 5001",
        "run Phi-3-mini:   make run PROFILE=phi-3-mini-4k",
    ]


def _why(promoted: PromotionRecord, found: EvaluatedVersion) -> str:
    """Why the alias stands where it does, where the verdict has not said it already."""
    return "" if promoted.reason == found.verdict.explained else f": {promoted.reason}"


def _aliases(name: str) -> list[str]:
    aliases = {alias: registry.alias_of(name, alias) for alias in ("challenger", "champion")}
    return [f"  {alias:<12} version {version}" for alias, version in aliases.items() if version]


def _figures(evaluated: Outcome[EvaluationRecord]) -> list[str]:
    """What was measured, and where the report on it is."""
    record = evaluated.record
    uri, found = next(iter(record.versions.items()))
    measured = [f"  {label:<34} {shown}" for label, shown in headline(headline_metrics(found))]
    if disturbed := unsound(found.metrics):
        measured.append(f"  {'its speed was':<34} {disturbed}")
    number = registry.number_of(uri)
    artifact = f"runs:/{record.run_id}/evaluation/{number}/report.html"
    return [
        "Measured", *measured,
        "Report", f"  {report_file(evaluated.entry, uri)}", f"  in MLflow: {artifact}",
    ]  # fmt: skip


def _run(step: str | None, *parameters: str) -> str:
    """A command of this project, as it is run from where this one runs, on the same store."""
    store = f"MLFLOW_TRACKING_URI={shlex.quote(tracking_identity())}"
    project = _project()
    if project is None:
        options = " ".join(
            f"--{name.replace('_', '-')} {value}"
            for name, _, value in (parameter.partition("=") for parameter in parameters)
        )
        return f"{store} phi3-mlflow {step or 'main'} {options}"
    entry = f" -e {step}" if step else ""
    given = " ".join(f"-P {parameter}" for parameter in parameters)
    return f"{store} {_mlflow()} run {project}{entry} --env-manager local {given}"


def _mlflow() -> str:
    """The program of the environment this runs in."""
    mlflow = Path(sys.executable).with_name("mlflow")
    if not mlflow.exists():
        return "mlflow"
    inside = mlflow.is_relative_to(Path.cwd())
    return str(mlflow.relative_to(Path.cwd()) if inside else mlflow)


def _from_anywhere(request: Request) -> str:
    """The profile as it is named from any working folder."""
    given = request.value("profile")
    return given if given in profile_names() else str(find_profile(given).absolute())


def _project() -> str | None:
    """How `mlflow run` is told where the project is; None for an installed package."""
    root = checkout()
    if root is None:
        return None
    if root == Path.cwd():
        return "."
    # `mlflow run GIT_URL` works in a clone that is gone afterwards.
    passing = root.is_relative_to(Path(tempfile.gettempdir()).resolve())
    return shlex.quote((origin().url if passing else None) or str(root))
