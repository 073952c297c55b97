"""Which tracking store MLflow talks to, and the experiment in it."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from phi3_mlflow.artifacts.cache import StepCache, key_of
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
    uri = os.environ["MLFLOW_TRACKING_URI"] = tracking_uri()
    try:
        mlflow.set_tracking_uri(uri)
        if not os.environ.get("MLFLOW_RUN_ID") and not os.environ.get("MLFLOW_EXPERIMENT_ID"):
            # MLflow lets two processes make the tables of one new database at the same time, and
            # one of them fails.
            with StepCache().locked("tracking", key_of({"tracking": tracking_identity()})):
                mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT_NAME))
    except MlflowException as error:
        raise EnvironmentProblem(
            f"MLflow's tracking store {uri} cannot be used: {error}\n"
            f"Set MLFLOW_TRACKING_URI to a database or a server, for example {DEFAULT_TRACKING_URI}"
        ) from error
    return uri
