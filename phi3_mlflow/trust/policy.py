"""What the section `trust` of a profile lets through, asked before a model is loaded."""

from __future__ import annotations

import re
from contextlib import nullcontext
from typing import TYPE_CHECKING

from phi3_mlflow.core.errors import VersionRefused
from phi3_mlflow.core.hints import run_command
from phi3_mlflow.tracking.registry import VersionName
from phi3_mlflow.tracking.stored_files import LOGGED, local_files, temporary_downloads
from phi3_mlflow.trust.keys import trusted
from phi3_mlflow.trust.settings import TrustSettings
from phi3_mlflow.trust.verify import UNSIGNED, Check, Demands, Subject, subject_of, verify

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_VERSION = re.compile(r"models:/([^/@:]+)/([1-9][0-9]*)")
OPEN = TrustSettings()
"""What lets everything through: the default of a profile."""


def demands_of(settings: TrustSettings, *, verdict: bool = False) -> Demands:
    """What a profile asks of a version.

    Raises:
        UserError: one of its keys is none.
    """
    signature = settings.require == "signature"
    return Demands(
        trusted=trusted(settings.keys, settings.identities),
        signature=signature,
        verdict=verdict and signature,
        oldest=settings.oldest_version,
    )


def refuse_untrusted(
    model_uri: str, settings: TrustSettings, folder: Path | None = None, *, verdict: bool = False
) -> None:
    """Refuse a model that the profile's policy does not let through.

    Args:
        model_uri: `models:/NAME/NUMBER`, or whatever else can be loaded.
        settings: the section `trust`; nothing is read where that asks for nothing.
        folder: the model's files on this machine, where they are known.
        verdict: a signed verdict is needed as well.

    Raises:
        VersionRefused: with the first reason; nothing of the model was loaded.
        UserError: there is no such model.
        EnvironmentProblem: its files are gone.
    """
    if settings.require == "none" and settings.oldest_version is None:
        return
    with temporary_downloads() if folder is None else nullcontext():
        files = local_files(model_uri) if folder is None else folder
        subject = named_subject(model_uri, files)
        checks = verify(subject, demands_of(settings, verdict=verdict))
    if failed := failures(checks):
        raise VersionRefused(
            f"{model_uri} is refused: {failed[0].name}: {failed[0].told}.\n"
            "The section trust of the profile asks for that. What else was checked:\n"
            f"  {run_command('verify', model_uri=model_uri)}{_way_out(subject, failed[0])}"
        )


def _way_out(subject: Subject, failed: Check) -> str:
    """How a version from before there were signatures gets one."""
    if failed.name != "signature" or failed.told != UNSIGNED or LOGGED not in subject.tags:
        return ""
    signs = run_command("register", model_uri=subject.tags[LOGGED])
    return f"\nWith the key, and if it is known to be good, it is signed by\n  {signs}"


def named_subject(model_uri: str, folder: Path) -> Subject:
    """What is checked of a model: a version with what the registry has of it, or files alone."""
    found = _VERSION.fullmatch(model_uri)
    if found is None:
        return Subject(model_uri, folder)
    return subject_of(VersionName(*found.groups()), folder)


def failures(checks: Sequence[Check]) -> list[Check]:
    """The checks that speak against a version; what was signed comes before what was written."""
    order = ("signature", "provenance", "registry", "verdict")
    failed = [check for check in checks if check.failed]
    return sorted(failed, key=lambda c: order.index(c.name) if c.name in order else len(order))
