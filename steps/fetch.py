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
from phi3_mlflow.params import Request
from phi3_mlflow.profiles import find_profile
from phi3_mlflow.provenance import content_digest, write_provenance
from phi3_mlflow.sources.spec import parse_source
from phi3_mlflow.step import Step, Work


def settings(request: Request) -> dict[str, Any]:
    from phi3_mlflow.sources import resolve_revision

    profile = request.profile
    spec = parse_source(profile.source)
    return {
        "source": profile.source,
        "source_revision": resolve_revision(
            spec, sha256=profile.sha256, base_dir=base_directory(request)
        ),
        "sha256": profile.sha256,
        "base_model": profile.base_model,
        "licence": profile.licence,
    }


def work(work: Work) -> None:
    from phi3_mlflow.checkpoints.validate import validate_checkpoint
    from phi3_mlflow.sources import fetch_source

    profile = work.request.profile
    fetched = fetch_source(
        parse_source(profile.source),
        work.out,
        sha256=profile.sha256,
        base_dir=base_directory(work.request),
        downloads=work.store.downloads,
        progress=console.progress,
    )
    info = validate_checkpoint(work.out)
    write_provenance(
        work.out,
        {
            "base_model": profile.base_model,
            "checkpoint_sha256": content_digest(work.out),
            "licence": profile.licence,
            "source": profile.source,
            "source_revision": fetched.revision,
        },
    )
    work.metrics["parameters"] = float(info.parameters)
    work.metrics["bytes_downloaded"] = float(fetched.bytes_downloaded)
    console.say(f"  {info.parameters / 1e6:.1f} million parameters, {info.architecture}")


def base_directory(request: Request) -> Path:
    """What a relative `file:` source counts from: the folder of the profile's file."""
    return find_profile(request.value("profile")).absolute().parent


STEP = Step(
    name="fetch",
    summary="getting the checkpoint from its source",
    parameters=("source",),
    inputs=lambda request, store: {},
    settings=settings,
    work=work,
    code=("steps/fetch.py", "phi3_mlflow/sources", "phi3_mlflow/checkpoints"),
    libraries=("gguf", "safetensors", "tokenizers"),
)

if __name__ == "__main__":
    run_script(STEP, __doc__)
