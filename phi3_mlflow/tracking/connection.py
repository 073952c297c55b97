"""Which tracking store MLflow talks to, and the experiment in it."""

from __future__ import annotations

import logging
import os
import re
import time
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from ssl import SSLError
from urllib.parse import unquote, urlsplit, urlunsplit

from phi3_mlflow.artifacts.cache import StepCache, key_of
from phi3_mlflow.core import console
from phi3_mlflow.core.errors import EnvironmentProblem

DEFAULT_TRACKING_URI = "sqlite:///mlflow.db"
EXPERIMENT_NAME = "phi3-mlflow"


def tracking_uri() -> str:
    """Where MLflow keeps its records, without asking it (a relative file counts from here)."""
    return os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_TRACKING_URI


def tracking_identity() -> str:
    """What tells one tracking store from another.

    Its URI, a relative file made absolute, without user name and password.
    """
    uri = tracking_uri()
    prefix = "sqlite:///"
    if uri.startswith(prefix):
        return prefix + str(Path(uri.removeprefix(prefix)).absolute())
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def is_server(uri: str) -> bool:
    """Whether a tracking store is a server, which has its own pages, and not a database."""
    return uri.startswith(("http://", "https://"))


def connect() -> str:
    """Point MLflow at the tracking store and the experiment; returns the tracking URI.

    `MLFLOW_TRACKING_URI` is honoured; without it the store is a SQLite file in the working folder.

    Raises:
        EnvironmentProblem: the store is one that MLflow no longer takes, or does not answer.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    # The schema of a new database is made in some fifty steps, each a line; none says anything.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # MLflow's own bars, and lines with the address of each run.
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    uri = os.environ["MLFLOW_TRACKING_URI"] = tracking_uri()
    check_server(uri)
    check_folder(uri, Path.cwd())
    try:
        mlflow.set_tracking_uri(uri)
        if not (os.environ.get("MLFLOW_REGISTRY_URI") or uri.startswith("databricks")):
            # Beside the records, as MLflow has it by default. Unless that is said, each client
            # looks for a Spark session first: an import, which in the thread that samples the
            # machine's load waits for the lock that MLflow holds while it evaluates, for ever.
            mlflow.set_registry_uri("")
        if not os.environ.get("MLFLOW_RUN_ID") and not os.environ.get("MLFLOW_EXPERIMENT_ID"):
            # MLflow lets two processes make the tables of one new database at the same time, and
            # one of them fails.
            with StepCache().locked("tracking", key_of({"tracking": tracking_identity()})):
                mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT_NAME))
    except MlflowException as error:
        if "deleted experiment" in str(error):
            raise EnvironmentProblem(_deleted_experiment()) from error
        raise EnvironmentProblem(
            f"MLflow's tracking store {uri} cannot be used: {error}\n"
            f"Set MLFLOW_TRACKING_URI to a database or a server, for example {DEFAULT_TRACKING_URI}"
        ) from error
    return uri


def check_folder(uri: str, folder: Path) -> None:
    """Refuse a working folder beside which MLflow would put the artifacts of an embedded store.

    Args:
        uri: of the tracking store.
        folder: where an embedded store keeps its artifacts.

    Raises:
        EnvironmentProblem: MLflow takes a part of the folder's name for an escaped character, or
            for options.
    """
    if not uri.startswith("sqlite:"):
        return
    found = re.search(r"%[0-9A-Fa-f]{2}", str(folder))
    if found:
        raise EnvironmentProblem(
            f"the working folder {folder} has {found[0]} in its name. MLflow reads that as an "
            f"escaped {unquote(found[0])!r}, and would put the artifacts into another folder.\n"
            "Rename the folder, or work in another one"
        )
    if "?" in str(folder) and str(folder) in uri:
        raise EnvironmentProblem(
            f"the tracking store {uri} is in a folder with ? in its name. What follows a ? is read "
            "as options, and the database would be made in another place.\n"
            "Rename the folder, or work in another one"
        )


def _deleted_experiment() -> str:
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT_NAME)
    return (
        f"the experiment {name} was deleted, and MLflow takes no runs into it.\n"
        "Bring it back:  mlflow experiments restore --experiment-id ID  (the id:  mlflow "
        "experiments search --view deleted_only), or set MLFLOW_EXPERIMENT_NAME to another name"
    )


_PROBE_S = 5.0
_PAUSES_S = (2.0, 5.0)
_answered: set[str] = set()


def check_server(uri: str) -> None:
    """See that a tracking server is there: MLflow's own attempts go on for minutes, silently.

    Args:
        uri: of the tracking store; those that are no server are not looked at.

    Raises:
        EnvironmentProblem: nobody answers, after three attempts that were told.
    """
    if not is_server(uri) or uri in _answered:
        return
    shown = tracking_identity()
    for pause in (*_PAUSES_S, None):
        problem = _unreachable(uri)
        if problem is None:
            _answered.add(uri)
            return
        if pause is not None:
            console.say(f"The tracking server {shown} does not answer ({problem}); "
                        f"trying again in {pause:g} s")  # fmt: skip
            time.sleep(pause)
    raise EnvironmentProblem(
        f"the tracking server {shown} does not answer: {problem}.\n"
        "Start it, or set MLFLOW_TRACKING_URI to another one, or to a database: "
        f"{DEFAULT_TRACKING_URI}"
    )


def _unreachable(uri: str) -> str | None:
    """Why nobody answers at the address of a server; None when somebody does, whatever it is."""
    parts = urlsplit(uri)
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    asked = kind(parts.hostname or "", parts.port, timeout=_PROBE_S)
    try:
        asked.connect()
        asked.request("GET", f"{parts.path.rstrip('/')}/health")
        asked.getresponse()
    except TimeoutError:
        what = "connection" if asked.sock is None else "answer"
        return f"no {what} within {_PROBE_S:g} s"
    except (HTTPException, SSLError):
        return None  # somebody is there: what is wrong with it, MLflow says
    except OSError as error:
        return error.strerror or str(error)
    finally:
        asked.close()
    return None
