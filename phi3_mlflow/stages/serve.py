r"""Serve a registered model: OpenAI's protocol, MLflow's protocol, and a chat page.

    mlflow run . --env-manager local -e serve -P profile=smollm2-135m
    python -m steps.serve --model-uri models:/smollm2-135m@champion --port 8000
    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \
         -d '{"messages": [{"role": "user", "content": "Hello!"}]}'

Serves the version that the alias `champion` of the profile's registered model points to, and takes
up another one when the alias moves. On any other address than this machine's own an API key is
needed, in the environment as PHI3_MLFLOW_API_KEY. Where the profile says `trust.require:
signature`, a version is verified before it is loaded; one that does not verify never answers. Ends
with Ctrl-C or SIGTERM, after the answers that are under way. docs/serving.md has the rest.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from phi3_mlflow.core import console
from phi3_mlflow.core.console import summary_line
from phi3_mlflow.pipeline.command import Command
from phi3_mlflow.server.settings import ServerSettings

if TYPE_CHECKING:
    from phi3_mlflow.config.parameters import Request
    from phi3_mlflow.trust.settings import TrustSettings


class Serve(Command):
    """Answering over HTTP."""

    name = "serve"
    parameters = (
        "profile", "model_uri", "host", "port", "running", "batch", "waiting",
        "request_limit_s", "body_limit_kb", "trace", "quiet",
    )  # fmt: skip

    def run(self, request: Request) -> None:
        given = {name: request.value(name) for name in self.parameters}
        settings = ServerSettings.read(given)
        uri = model_uri(request)
        serve(uri, settings, request.profile.trust)
        print(summary_line(step="serve", status="done", model=uri), flush=True)


def model_uri(request: Request) -> str:
    """The model to serve: the one that was named, or the profile's champion."""
    if not request.is_auto("model_uri"):
        return request.value("model_uri")
    return f"models:/{request.profile.registered_model}@champion"


def serve(uri: str, settings: ServerSettings, trust: TrustSettings) -> None:
    """Load the model, then listen.

    Args:
        uri: the model; an alias is followed.
        settings: of the server.
        trust: what has to be so of a version before it is loaded.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    from phi3_mlflow.server.app import create_app
    from phi3_mlflow.server.holder import Holder, load, resolve
    from phi3_mlflow.server.run import run
    from phi3_mlflow.tracking import registry

    client = registry.client()
    console.say(f"Loading {uri} ...")
    holder = Holder(
        lambda: resolve(uri, client),
        lambda target: load(target, settings.batch, trust),
        follow_s=settings.follow_s,
    )
    app = create_app(settings, holder, uri)

    def ready(address: str) -> None:
        now = holder.current
        console.say(
            f"{now.name} version {now.version} at {address} "
            f"(OpenAI base URL {address}/v1, chat page {address}/)"
            + (", with API key" if settings.api_key else "")
        )

    run(app, settings, ready)


COMMAND = Serve()
