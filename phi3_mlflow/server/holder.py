"""The model that answers now: loads it, follows its alias, and says which version it is."""

from __future__ import annotations

import logging
import re
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phi3_mlflow.core.errors import EnvironmentProblem, ProjectError, UserError
from phi3_mlflow.core.hints import run_command
from phi3_mlflow.server.backend import Backend, backend_of
from phi3_mlflow.tracking import registry
from phi3_mlflow.tracking.stored_files import local_files, require_whole
from phi3_mlflow.trust.policy import OPEN, refuse_untrusted

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlflow import MlflowClient
    from mlflow.pyfunc import PyFuncModel

    from phi3_mlflow.trust.settings import TrustSettings

log = logging.getLogger("phi3_mlflow.server")
_REGISTERED = re.compile(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+|latest))")
_RETRY_S = 60.0  # a version that could not be loaded is tried again after so long


@dataclass(frozen=True)
class Target:
    """One model that does not change: a version, or a logged model.

    Attributes:
        name: what clients call it.
        version: the version's number, or the id of a model that is not registered.
        uri: loads just this one.
    """

    name: str
    version: str
    uri: str


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to answer."""

    target: Target
    model: PyFuncModel | None
    backend: Backend
    since: float  # seconds since the epoch

    @property
    def name(self) -> str:
        """What clients call the model."""
        return self.target.name

    @property
    def version(self) -> str:
        """Which version it is; see `Target.version`."""
        return self.target.version


def resolve(uri: str, client: MlflowClient | None = None) -> Target:
    """Where a model URI points to at this moment.

    Raises:
        UserError: there is no such version, or nothing has the alias.
    """
    found = _REGISTERED.fullmatch(uri)
    if not found:
        last = uri.rstrip("/").rpartition("/")[2] or uri
        # The path of a folder is nobody's business but the server's.
        return Target(last, last, uri)
    from mlflow.exceptions import MlflowException

    name, alias, version = found.groups()
    if client is None:
        client = registry.client()
    try:
        if alias is not None:
            version = str(client.get_model_version_by_alias(name, alias).version)
        elif version == "latest":
            version = _latest(name, client)
        else:
            client.get_model_version(name, version)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            what = f"alias {alias}" if alias is not None else f"version {version}"
            raise UserError(
                f"model_uri: {uri}: the registry has no {what} of a model {name}.\n"
                f"`{run_command()}` makes, checks and promotes one; `mlflow ui` shows those "
                "there are"
            ) from None
        raise
    return Target(name, version, f"models:/{name}/{version}")


def _latest(name: str, client: MlflowClient) -> str:
    """The highest version of a registered model.

    Raises:
        UserError: it has none.
    """
    numbers = [int(found.version) for found in client.search_model_versions(f"name = '{name}'")]
    if not numbers:
        raise UserError(f"model_uri: models:/{name}/latest: the registry has no version of {name}")
    return str(max(numbers))


def load(target: Target, batch: int = 1, trust: TrustSettings = OPEN) -> Loaded:
    """Load a model, after its files were compared with what was logged and, if asked for, signed.

    Args:
        target: what to load.
        batch: how many requests it computes together, if it can.
        trust: what is let through.

    Raises:
        UserError, EnvironmentProblem: it cannot be loaded, and why.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        # From there, lest a store that is no folder of this machine is downloaded from twice.
        files = local_files(target.uri)
        refuse_untrusted(target.uri, trust, files)
        require_whole(files, target.uri)
        folder = str(files)
        model = mlflow.pyfunc.load_model(folder, model_config=_config(folder, batch))
    except MlflowException as error:
        raise UserError(f"model_uri: {target.uri} cannot be loaded: {error.message}") from error
    except (OSError, ImportError) as error:
        raise EnvironmentProblem(f"{target.uri} cannot be loaded here: {error}") from error
    return Loaded(target, model, backend_of(model), time.time())


def _config(uri: str, batch: int) -> dict[str, Any] | None:
    """`model_config` to load a model with: MLflow warns of values that it was not logged with."""
    import mlflow

    logged = mlflow.models.get_model_info(uri).flavors.get("python_function", {})
    return {"batch": batch} if "batch" in (logged.get("config") or {}) else None


class Holder:
    """Holds the model that answers. Requests take `current` once and keep it to their end.

    Args:
        resolve: where the URI points to now.
        load: loads what it points to.
        follow_s: seconds between two looks.
        on_change: called with what happened: `loaded`, `failed`, `unreachable`.
    """

    def __init__(
        self,
        resolve: Callable[[], Target],
        load: Callable[[Target], Loaded] = load,
        follow_s: float = 5.0,
        on_change: Callable[[str], None] = lambda what: None,
    ) -> None:
        self._resolve = resolve
        self._load = load
        self._follow_s = follow_s
        self.on_change = on_change
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._failed: tuple[Target, float] | None = None
        self.current = load(resolve())

    def start(self) -> None:
        """Follow the alias from now on."""
        self._thread = threading.Thread(target=self._follow, name="follow-alias", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Follow the alias no more."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=2)

    def look(self) -> bool:
        """Look where the alias points, and load what it points to if that is new.

        The model that answers stays until the new one is ready, and beyond for the requests that
        it is answering.

        Returns:
            Whether another model answers now.
        """
        try:
            target = self._resolve()
        except Exception as error:  # the registry is away, or the alias is: keep what there is
            log.warning("cannot see where the alias points: %s", type(error).__name__)
            self.on_change("unreachable")
            return False
        if target == self.current.target:
            return False
        if self._failed is not None:
            failed, when = self._failed
            if failed == target and time.monotonic() - when < _RETRY_S:
                return False
        try:
            self.current = self._load(target)
        except Exception as error:
            self._failed = target, time.monotonic()
            # What a library says may have in it what is nobody's business but the server's.
            known = isinstance(error, ProjectError)
            why = str(error).partition("\n")[0] if known else type(error).__name__
            log.error(
                "version %s of %s cannot be loaded (%s); version %s goes on answering",
                target.version, target.name, why, self.current.version,
            )  # fmt: skip
            self.on_change("failed")
            return False
        self._failed = None
        log.info("version %s of %s answers now", target.version, target.name)
        self.on_change("loaded")
        return True

    def _follow(self) -> None:
        while not self._stop.wait(self._follow_s):
            self.look()
