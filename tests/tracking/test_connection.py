"""A tracking store that is away, or an experiment that was deleted, is told in seconds, aloud."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import mlflow
import pytest

from phi3_mlflow.core.errors import EnvironmentProblem
from phi3_mlflow.tracking import connection
from tests.conftest import Workspace


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_PAUSES_S", (0.0, 0.0))
    monkeypatch.setattr(connection, "_answered", set())


@pytest.fixture
def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


class _Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def listening() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.fixture
def silent() -> Iterator[int]:
    """A port that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


def test_a_server_that_is_away_is_told_with_each_attempt(
    free_port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = f"http://me:secret@127.0.0.1:{free_port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(EnvironmentProblem, match="does not answer: Connection refused") as told:
        connection.connect()
    heard = capsys.readouterr().err
    assert heard.count("trying again in") == 2
    assert "secret" not in heard + str(told.value)


def test_a_server_that_is_there_is_asked_once(listening: int) -> None:
    uri = f"http://127.0.0.1:{listening}"
    connection.check_server(uri)
    assert uri in connection._answered
    connection.check_server(uri)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_server_that_takes_the_connection_and_never_answers(
    scheme: str, silent: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(connection, "_PROBE_S", 0.2)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{scheme}://127.0.0.1:{silent}")
    with pytest.raises(EnvironmentProblem, match=r"does not answer: no \w+ within 0\.2 s"):
        connection.connect()
    assert capsys.readouterr().err.count("trying again in") == 2


def test_a_name_that_nobody_has() -> None:
    with pytest.raises(EnvironmentProblem, match="does not answer"):
        connection.check_server("http://nobody.invalid:5000")


@pytest.mark.parametrize("uri", ["sqlite:///x.db", "postgresql://h/d", "databricks"])
def test_what_is_no_server_is_not_probed(uri: str) -> None:
    connection.check_server(uri)


def test_nobody_looks_for_spark_to_find_the_registry(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An import in a thread of MLflow's own and one under its lock can wait for each other."""
    from mlflow.tracking._model_registry import utils

    def looked() -> None:
        raise AssertionError("it imports")

    monkeypatch.setattr(utils, "_get_active_spark_session", looked)
    monkeypatch.setattr(utils, "_registry_uri", None)
    connection.connect()
    assert mlflow.get_registry_uri() == workspace.tracking_uri
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "http://registry.example")
    monkeypatch.setattr(utils, "_registry_uri", None)
    connection.connect()
    assert mlflow.get_registry_uri() == "http://registry.example"


def test_a_deleted_experiment_says_how_to_bring_it_back(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection.connect()
    found = mlflow.get_experiment_by_name(connection.EXPERIMENT_NAME)
    assert found is not None
    mlflow.delete_experiment(found.experiment_id)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID", raising=False)  # MLflow leaves it there
    with pytest.raises(EnvironmentProblem, match="experiments restore") as told:
        connection.connect()
    assert "MLFLOW_TRACKING_URI" not in str(told.value)


@pytest.mark.parametrize("name", ["a%20b", "a%2Fb", "%e4"])
def test_a_folder_that_mlflow_would_miss_is_refused(name: str) -> None:
    with pytest.raises(EnvironmentProblem, match="escaped"):
        connection.check_folder("sqlite:///mlflow.db", Path("/work", name, "deep"))
    connection.check_folder("http://localhost:5000", Path("/work", name))


def test_a_question_mark_in_the_folder_of_the_store_is_refused() -> None:
    folder = Path("/work/why?")
    with pytest.raises(EnvironmentProblem, match="read as options"):
        connection.check_folder(f"sqlite:///{folder}/mlflow.db", folder)
    connection.check_folder("sqlite:////elsewhere/mlflow.db?timeout=5", folder)


@pytest.mark.parametrize("name", ["a b", "a#b", "a b#c", "a?b", "a%b", "100%", "\u00fc", "a'b"])
def test_other_odd_names_are_held(name: str) -> None:
    connection.check_folder("sqlite:///mlflow.db", Path("/work", name))
