"""Check a version or a folder: files, signature, provenance, verdict, registry.

    mlflow run . --env-manager local -e verify -P profile=smollm2-135m
    python -m steps.verify --model-uri models:/smollm2-135m/3 --keys release.pub
    python -m steps.verify --model-uri /tmp/downloaded --keys release.pub --output found.json
    python -m steps.verify --model-uri 3 --rebuild true

Nothing of the model is loaded or run. Every file is hashed and compared with what was logged, with
what was signed, and with the recipe; what was signed is compared with the registry's tags. A model
that is not signed is checked as far as that goes, and fails where `keys` are given or the profile
says `trust.require: signature`. `rebuild=true` makes the version again, as `reproduce` does. Ends
with code 0, or with 4 when something is not as it should be. docs/trust.md has the rest.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from phi3_mlflow.config.parameters import AUTO, Request
from phi3_mlflow.core import console
from phi3_mlflow.core.console import summary_line
from phi3_mlflow.core.errors import NotReproduced, NotVerified, UserError
from phi3_mlflow.pipeline.command import Command
from phi3_mlflow.pipeline.step import carry_out
from phi3_mlflow.stages.asked_model import model_uri
from phi3_mlflow.stages.reproduce import STEP as REPRODUCE
from phi3_mlflow.tracking import registry
from phi3_mlflow.tracking.stored_files import local_files, temporary_downloads
from phi3_mlflow.trust.keys import trusted
from phi3_mlflow.trust.policy import demands_of, failures, named_subject
from phi3_mlflow.trust.verify import Check, Demands, Subject, verify

if TYPE_CHECKING:
    from collections.abc import Sequence

_WORDS = {"ok": "ok", "failed": "FAILED", "not checked": "-"}


class Verify(Command):
    """Version, folder or URI to a table of checks."""

    name = "verify"
    parameters = ("profile", "model_uri", "keys", "rebuild", "data", "output", "quiet")

    def run(self, request: Request) -> None:
        demanded = demands(request)
        with temporary_downloads():
            asked = asked_for(request)
            if request.flag("rebuild") and asked.version is None:
                raise UserError(
                    f"parameter: rebuild: {asked.shown} is no version of a registered model, and "
                    "only such a one can be made again"
                )
            checks = verify(asked, demanded)
        if request.flag("rebuild"):
            checks.append(rebuilt(request, asked, checks))
        failed = failures(checks)
        if not request.is_auto("output"):
            write(Path(request.value("output")).expanduser().absolute(), asked, checks)
        print(table(asked, checks), flush=True)
        if failed:
            raise NotVerified(f"{asked.shown} does not verify: {failed[0].name}: {failed[0].told}")
        signed = any(check.name == "signature" and check.state == "ok" for check in checks)
        print(
            summary_line(step="verify", status="done", model=asked.shown, signed=signed), flush=True
        )


def asked_for(request: Request) -> Subject:
    """What is to be checked, with its files on this machine.

    Raises:
        UserError: there is no such thing.
        EnvironmentProblem: its files are gone.
    """
    asked = request.value("model_uri")
    if asked != AUTO and (folder := Path(asked).expanduser()).is_dir():
        return Subject(asked, folder)
    text = model_uri(request)
    if "://" not in text and ":/" not in text:
        raise UserError(
            f"parameter: model_uri = {text!r}: there is no such folder, and it is no version's "
            "number and no URI"
        )
    registry.client()
    return named_subject(text, local_files(text))


def demands(request: Request) -> Demands:
    """What has to be so: as the profile says, and signed where keys are given.

    Raises:
        UserError: a key is none.
    """
    asked = demands_of(request.profile.trust)
    if request.is_auto("keys"):
        return asked
    named = [part.strip() for part in request.value("keys").split(",") if part.strip()]
    return replace(asked, trusted=trusted(named), signature=True)


def rebuilt(request: Request, asked: Subject, checks: Sequence[Check]) -> Check:
    """Make the version again; not one that is suspect already: its recipe names what is run."""
    if failures(checks):
        return Check("rebuild", "not checked", "something else is wrong already")
    values = {
        "version": asked.shown,
        "data": request.value("data"),
        "quiet": request.value("quiet"),
    }
    try:
        carry_out(REPRODUCE, Request(request.profile, values))
    except (NotReproduced, UserError) as error:
        told, *details = str(error).splitlines()
        return Check("rebuild", "failed", told, tuple(line.strip(" -") for line in details))
    return Check("rebuild", "ok", "made again, to the same bytes")


def table(asked: Subject, checks: Sequence[Check]) -> str:
    """What was found, a line per check."""
    named = max(len(check.name) for check in checks)
    lines = [asked.shown]
    for check in checks:
        lines.append(f"  {check.name:<{named}}  {_WORDS[check.state]:<6}  {check.told}")
        if len(check.details) > 1:
            lines += [f"  {'':<{named}}          {line}" for line in check.details]
    return "\n".join(lines)


def write(output: Path, asked: Subject, checks: Sequence[Check]) -> None:
    """Write what was found as JSON.

    Raises:
        UserError: there is no such place.
    """
    found = {
        "model": asked.shown,
        "verified": not failures(checks),
        "checks": [asdict(check) for check in checks],
    }
    try:
        output.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", "utf-8")
    except OSError as error:
        raise UserError(
            f"parameter: output = {str(output)!r} cannot be written: {error.strerror}"
        ) from error
    console.say(f"  written: {output}")


COMMAND = Verify()
