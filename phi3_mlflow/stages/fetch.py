"""Fetch a model from its source into the cache, checked, as a Hugging Face checkpoint.

    mlflow run . --env-manager local -e fetch -P profile=smollm2-135m
    python -m steps.fetch --profile phi-3-mini-4k

The source and its pinned revision are the profile's `source`. Whatever arrives is compared with
the hashes that the source and the profile state, and a checkpoint that could run code is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_mlflow.artifacts.cache import Entry, StepCache
from phi3_mlflow.artifacts.provenance import content_digest, read_provenance, write_provenance
from phi3_mlflow.core import console
from phi3_mlflow.core.errors import CheckpointRefused, EnvironmentProblem, UserError, problem_list
from phi3_mlflow.core.progress import show_progress
from phi3_mlflow.pipeline.step import (
    NoInputs,
    NoRecord,
    Settings,
    Step,
    Work,
    step_parameters,
)
from phi3_mlflow.sources.spec import HubSource, SourceSpec, parse_source

if TYPE_CHECKING:
    from collections.abc import Mapping

    from phi3_mlflow.config.parameters import Request
    from phi3_mlflow.config.profile import Profile

REVISION = "source_revision"
"""What `main` hands over: the commit that a branch was at when it began."""


UNFIT, CHAT, ONNX = "unfit", "chat", "onnx"
"""Where the provenance of a checkpoint says what it cannot be used for."""


class Fetch(Step[NoInputs, NoRecord]):
    """Source to checkpoint."""

    name = "fetch"
    doing = "getting the checkpoint from its source"
    parameters = step_parameters("source", "time_limit_s", "lock")

    def inputs(self, request: Request, cache: StepCache) -> NoInputs:
        return NoInputs()

    def settings(self, request: Request) -> Settings:
        profile = request.profile
        return {
            "source": profile.origin,
            # `main` asks once: a branch may move between two questions.
            "source_revision": request.handed(REVISION, str) or revision(request),
            "sha256": profile.sha256,
            "remote_code": profile.remote_code,
            "base_model": profile.base_model,
            "licence": profile.licence,
        }

    def foresee(self, request: Request, inputs: NoInputs) -> str | None:
        from phi3_mlflow.sources.fetch import size_of_source

        spec = parse_source(request.profile.origin)
        try:
            size = size_of_source(spec, base_dir=request.base_directory)
        except EnvironmentProblem:  # the source cannot be asked now
            return None
        if size is None:
            return None
        what = "download and of disk" if isinstance(spec, HubSource) else "disk"
        return f"{size / 1e6:.0f} MB of {what}"

    def work(self, work: Work[NoInputs]) -> None:
        from phi3_mlflow.checkpoints.chat import settle_chat
        from phi3_mlflow.checkpoints.validate import validate_checkpoint
        from phi3_mlflow.sources.fetch import fetch_source

        profile = work.request.profile
        fetched = fetch_source(
            pinned(profile.origin, work.settings["source_revision"]),
            work.out,
            sha256=profile.sha256,
            base_dir=work.request.base_directory,
            downloads=work.cache.downloads,
            progress=show_progress,
            time_limit_s=profile.time_limit_s,
            remote_code=profile.remote_code,
        )
        info = validate_checkpoint(work.out)
        chat = settle_chat(work.out)
        unfit = {CHAT: list(chat.problems), ONNX: _onnx_problems(info.config)}
        _refuse_unfit(profile, unfit)
        changes = [*fetched.changes, *chat.changes]
        write_provenance(
            work.out,
            {
                "base_model": profile.base_model,
                "changes": changes,
                "checkpoint_sha256": content_digest(work.out),
                "licence": profile.licence,
                "lock": fetched.lock,
                "source": profile.origin,
                "source_revision": fetched.revision,
            }
            | ({UNFIT: unfit} if any(unfit.values()) else {}),
        )
        work.metrics["parameters"] = float(info.parameters)
        work.metrics["bytes_downloaded"] = float(fetched.bytes_downloaded)
        for line in (*changes, *chat.notes):
            console.say(f"  {line}")
        console.say(f"  {info.parameters / 1e6:.1f} million parameters, {info.architecture}")

    def after(self, request: Request, entry: Entry) -> None:
        """Refuse what another profile could use; write the lock where the user wants it."""
        from phi3_mlflow.sources.fetch import write_lock

        known = read_provenance(entry.path)
        _refuse_unfit(request.profile, known.get(UNFIT, {}))
        if request.is_auto("lock"):
            return
        file = Path(request.value("lock")).expanduser()
        try:
            file.write_text(write_lock(known["source"], known["source_revision"], known["lock"]))
        except OSError as error:
            raise UserError(
                f"parameter: lock = {request.value('lock')!r}: cannot be written: {error.strerror}"
            ) from error
        console.say(f"  the lock is in {file.absolute()}; put its lines into the profile")


def _onnx_problems(config: Mapping[str, Any]) -> list[str]:
    from phi3_mlflow.checkpoints.rope import onnx_problems, read_rope

    rope, problems = read_rope(config)
    return problems if rope is None else onnx_problems(rope)


def _refuse_unfit(profile: Profile, unfit: Mapping[str, list[str]]) -> None:
    """Refuse a checkpoint that is sound, and not for what the profile makes of it.

    Raises:
        CheckpointRefused: says why, and what it can be used for.
    """
    if profile.contract == "chat" and unfit.get(CHAT):
        raise CheckpointRefused(
            problem_list(
                f"{profile.origin} cannot hold a conversation",
                unfit[CHAT],
                "Put a template into its tokenizer_config.json (chat_template) or beside it as "
                "chat_template.jinja, or write  contract: prompt  into the profile.",
            )
        )
    if profile.makes_onnx and unfit.get(ONNX):
        raise CheckpointRefused(
            problem_list(f"no ONNX model can be made of {profile.origin}", unfit[ONNX])
        )


def revision(request: Request) -> str:
    """What the profile's source stands for at this moment.

    Raises:
        EnvironmentProblem: the branch that it follows cannot be asked for.
    """
    from phi3_mlflow.sources.fetch import resolve_revision

    profile = request.profile
    spec = parse_source(profile.origin)
    try:
        return resolve_revision(spec, sha256=profile.sha256, base_dir=request.base_directory)
    except EnvironmentProblem as error:
        if isinstance(spec, HubSource) and not spec.pinned:
            raise EnvironmentProblem(
                f"{error}\nSo it is not known where the branch {spec.revision} of {spec.repo} is. "
                "Nothing was changed: the versions and the champion stay as they are."
            ) from error
        raise


def followed(request: Request) -> dict[str, str]:
    """Where the branch that the profile follows is now, for `main` to hand on; else nothing."""
    spec = parse_source(request.profile.origin)
    if isinstance(spec, HubSource) and not spec.pinned:
        return {REVISION: revision(request)}
    return {}


def where(request: Request, followed: Mapping[str, str]) -> str | None:
    """A sentence on the branch: where it is, and where it was when it was fetched last."""
    if not (now := followed.get(REVISION)):
        return None
    last = StepCache().latest(request.profile.name, STEP.name)
    before = last and last.origin.get("parts", {}).get("settings", {}).get("source_revision")
    moved = ", as when it was fetched last" if before == now else f"; fetched last: {before}"
    return f"{request.profile.origin} is at {now} now{moved if before else ''}."


def pinned(source: str, revision: str) -> SourceSpec:
    """The source at the revision that went into the key: a branch may move in the meantime."""
    spec = parse_source(source)
    return parse_source(f"hf:{spec.repo}@{revision}") if isinstance(spec, HubSource) else spec


STEP = Fetch()
