"""The hub's address, who asks, whether the network may be used, and what a refusal means."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from phi3_mlflow import __version__
from phi3_mlflow.core.errors import EnvironmentProblem, ProjectError, UserError
from phi3_mlflow.sources.common import environment_flag
from phi3_mlflow.sources.transfer import Transfer

if TYPE_CHECKING:
    import httpx

    from phi3_mlflow.sources.retrying import Deadline, RetryPolicy
    from phi3_mlflow.sources.spec import HubSource

_PRINTABLE = re.compile(r"[\x21-\x7e]+")


def offline() -> bool:
    """Whether huggingface_hub's offline mode is on."""
    return environment_flag("HF_HUB_OFFLINE") or environment_flag("TRANSFORMERS_OFFLINE")


def token() -> str | None:
    """The user's hub token, from HF_TOKEN or where `hf auth login` left it.

    Raises:
        UserError: it cannot be sent; the message does not hold it.
    """
    from huggingface_hub import get_token

    if environment_flag("HF_HUB_DISABLE_IMPLICIT_TOKEN"):
        return None
    found = get_token()
    if found is not None and not _PRINTABLE.fullmatch(found):
        raise UserError(
            "the Hugging Face token (HF_TOKEN) holds spaces, line breaks or characters outside "
            "ASCII; set it again"
        )
    return found


def endpoint() -> str:
    """The hub's address: HF_ENDPOINT, or huggingface.co."""
    from huggingface_hub import constants

    address = os.environ.get("HF_ENDPOINT", "").rstrip("/") or constants.ENDPOINT
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        raise UserError("HF_ENDPOINT must be an address like https://huggingface.co")
    return address


def hub_transfer(spec: HubSource, policy: RetryPolicy, deadline: Deadline) -> Transfer:
    """Requests to the hub as this user."""
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined, unused-ignore]

    address, secret = endpoint(), token()
    local = urlsplit(address).hostname in ("localhost", "127.0.0.1", "::1")
    if secret and not address.startswith("https://") and not local:
        raise UserError(
            "HF_ENDPOINT is not https: the Hugging Face token would be readable on the way. "
            "Use https, or unset HF_TOKEN."
        )
    headers = build_hf_headers(
        token=secret or False, library_name="phi3-mlflow", library_version=__version__
    )

    def refuse(what: str, response: httpx.Response) -> ProjectError:
        return _refusal(spec, what, response, bool(secret))

    return Transfer(address, headers, policy, deadline, refuse)


def _refusal(
    spec: HubSource, what: str, response: httpx.Response, with_token: bool
) -> ProjectError:
    """An answer that will not get better by asking again, as an error."""
    status, code = response.status_code, response.headers.get("X-Error-Code", "")
    page = f"{endpoint()}/{spec.repo}"
    if status in (401, 403) or code == "GatedRepo":
        how = (
            "The token was sent: its account must have accepted the conditions there, and the "
            "token must be allowed to read."
            if with_token
            else "Accept the conditions there if there are any, and set HF_TOKEN to a token that "
            "may read it."
        )
        return UserError(f"{what}: the hub does not give {page} to this user ({status}). {how}")
    if code == "RevisionNotFound":
        return UserError(f"{what}: {page} has no revision {spec.revision!r}")
    if code == "EntryNotFound":
        return EnvironmentProblem(f"{what}: listed, but not there ({status})")
    if status == 404:
        return UserError(f"{what}: {page} does not exist, or is private and needs HF_TOKEN (404)")
    if status in (410, 451) or code == "DisabledRepo":
        return UserError(f"{what}: {page} was taken down ({status})")
    return EnvironmentProblem(f"{what}: the hub answers {status}")
