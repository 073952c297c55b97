"""Fetch a model from its source into the cache, checked, as a Hugging Face checkpoint.

    mlflow run . -e fetch -P profile=smollm2-135m
    python -m steps.fetch --profile phi-3-mini-4k

The source and its pinned revision are the profile's `source`. Whatever arrives is compared with
the hashes that the source and the profile state, and a checkpoint that could run code is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from phi3_mlflow import console
from phi3_mlflow.cli import run_script
from phi3_mlflow.errors import UserError
from phi3_mlflow.params import Request
from phi3_mlflow.profiles import find_profile
from phi3_mlflow.provenance import content_digest, read_provenance, write_provenance
from phi3_mlflow.sources.spec import HubSource, SourceSpec, parse_source
from phi3_mlflow.step import Step, Work
from phi3_mlflow.store import Entry


def settings(request: Request) -> dict[str, Any]:
    from phi3_mlflow.sources import resolve_revision

    profile = request.profile
    return {
        "source": profile.source,
        "source_revision": resolve_revision(
            parse_source(profile.source), sha256=profile.sha256, base_dir=base_directory(request)
        ),
        "sha256": profile.sha256,
        "remote_code": profile.remote_code,
        "base_model": profile.base_model,
        "licence": profile.licence,
    }


def work(work: Work) -> None:
    from phi3_mlflow.checkpoints.validate import validate_checkpoint
    from phi3_mlflow.sources import fetch_source

    profile = work.request.profile
    fetched = fetch_source(
        pinned(profile.source, work.settings["source_revision"]),
        work.out,
        sha256=profile.sha256,
        base_dir=base_directory(work.request),
        downloads=work.store.downloads,
        progress=console.progress,
        time_limit_s=profile.time_limit_s,
        remote_code=profile.remote_code,
    )
    info = validate_checkpoint(work.out)
    write_provenance(
        work.out,
        {
            "base_model": profile.base_model,
            "changes": list(fetched.changes),
            "checkpoint_sha256": content_digest(work.out),
            "licence": profile.licence,
            "lock": fetched.lock,
            "source": profile.source,
            "source_revision": fetched.revision,
        },
    )
    work.metrics["parameters"] = float(info.parameters)
    work.metrics["bytes_downloaded"] = float(fetched.bytes_downloaded)
    for change in fetched.changes:
        console.say(f"  {change}")
    console.say(f"  {info.parameters / 1e6:.1f} million parameters, {info.architecture}")


def pinned(source: str, revision: str) -> SourceSpec:
    """The source at the revision that went into the key: a branch may move in the meantime."""
    spec = parse_source(source)
    return parse_source(f"hf:{spec.repo}@{revision}") if isinstance(spec, HubSource) else spec


def write_lock_file(request: Request, entry: Entry) -> None:
    """Write the pinned source and its files' hashes where the user wants them."""
    if request.is_auto("lock"):
        return
    from phi3_mlflow.sources import write_lock

    known = read_provenance(entry.path)
    file = Path(request.value("lock")).expanduser()
    try:
        file.write_text(write_lock(known["source"], known["source_revision"], known["lock"]))
    except OSError as error:
        raise UserError(
            f"parameter: lock = {request.value('lock')!r}: cannot be written: {error.strerror}"
        ) from error
    console.say(f"  the lock is in {file.absolute()}; put its lines into the profile")


def base_directory(request: Request) -> Path:
    """What a relative `file:` source counts from: the folder of the profile's file."""
    return find_profile(request.value("profile")).absolute().parent


STEP = Step(
    name="fetch",
    summary="getting the checkpoint from its source",
    parameters=("source", "time_limit_s", "lock"),
    inputs=lambda request, store: {},
    settings=settings,
    work=work,
    code=("steps/fetch.py", "phi3_mlflow/sources", "phi3_mlflow/checkpoints"),
    libraries=("gguf", "safetensors", "tokenizers"),
    after=write_lock_file,
)

if __name__ == "__main__":
    run_script(STEP, __doc__)
