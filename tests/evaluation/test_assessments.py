"""The answers as a GenAI evaluation in MLflow, with and without a judge model."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from phi3_mlflow.core.errors import EnvironmentProblem, UserError
from phi3_mlflow.evaluation.assessments import log_answers
from phi3_mlflow.evaluation.gate import check_thresholds
from phi3_mlflow.evaluation.items import Question
from phi3_mlflow.evaluation.judge import check_judge
from phi3_mlflow.evaluation.measurement import Measurement
from phi3_mlflow.evaluation.sets import Sets, set_name
from phi3_mlflow.evaluation.settings import Bound, JudgeSettings
from phi3_mlflow.tracking import registry
from phi3_mlflow.tracking.connection import connect
from phi3_mlflow.tracking.logged_sets import log_sets
from phi3_mlflow.tracking.runs import step_run
from tests.conftest import Workspace, own_store
from tests.evaluation.measurements import measurement

KEY = "sk-nobody-may-see-this"
RIGHT = (True, False, True, True)
SAYS_YES = "Twice"  # the judge below says yes to what holds this word


def question(number: int) -> Question:
    return Question.model_validate(
        {
            "id": f"q{number}",
            "category": ("facts", "json")[number % 2],
            "messages": [
                {"role": "user", "content": f"{SAYS_YES if number else 'Once'} {number}?"}
            ],
            "check": {"kind": "exact", "value": "yes"},
        }
    )


QUESTIONS = [question(number) for number in range(len(RIGHT))]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    with own_store(tmp_path_factory.mktemp("assessments")) as found:
        yield found


@pytest.fixture
def version(place: Workspace, request: pytest.FixtureRequest) -> registry.VersionName:
    """A registered version that is a logged model, without files."""
    import mlflow

    connect()
    model = mlflow.initialize_logged_model(name="m")
    client = registry.client()
    client.create_registered_model(request.node.name)
    uri = f"models:/{model.model_id}"
    client.create_model_version(request.node.name, source=uri, tags={registry.LOGGED: uri})
    return registry.VersionName(request.node.name, "1")


def run_of_answers(version: registry.VersionName) -> Any:
    import mlflow

    wanted = f"tags.`mlflow.runType` = 'genai_evaluate' and tags.version = '{version.uri}'"
    (run,) = mlflow.search_runs(filter_string=wanted, output_format="list")
    return run


def traces(version: registry.VersionName) -> dict[str, Any]:
    import mlflow

    found = mlflow.search_traces(run_id=run_of_answers(version).info.run_id, return_type="list")
    return {trace.info.tags["question"]: trace for trace in found}


def values(trace: Any) -> dict[str, Any]:
    return {a.name: a.value for a in trace.info.assessments}


def test_every_answer_is_a_trace_with_its_assessments(
    version: registry.VersionName, capsys: pytest.CaptureFixture[str]
) -> None:
    found = measurement(RIGHT)
    assert log_answers(version, QUESTIONS, found) == {}
    assert "Evaluation completed" not in capsys.readouterr().out
    run, logged = run_of_answers(version), traces(version)
    assert set(logged) == {f"q{number}" for number in range(len(RIGHT))}
    for number, answer in enumerate(found.answers):
        trace = logged[f"q{number}"]
        assert values(trace) == {
            "correct": RIGHT[number],
            "category": answer.category,
            "no_loop": True,
            "ended": True,
            "expected_response": "yes",
        }
        span = trace.data.spans[0]
        assert span.inputs["messages"][0]["content"] == QUESTIONS[number].messages[0].content
        assert span.outputs["choices"][0]["message"]["content"] == answer.text
        assert trace.info.execution_duration == pytest.approx(1000 * answer.seconds, abs=2)
        assert trace.info.token_usage["output_tokens"] == answer.completion_tokens
        assert trace.info.trace_metadata["mlflow.modelId"] == registry.logged_model_id(version)
    assert run.data.metrics["correct/mean"] == run.data.metrics["accuracy"] == 0.75
    assert run.data.metrics["kl_mean"] == found.metrics["kl_mean"]
    assert run.info.status == "FINISHED"
    assert run.data.tags["owner_pid"], "a run that is killed could not be told from a live one"


def test_the_set_that_was_asked_has_one_name_and_digest(version: registry.VersionName) -> None:
    sets = Sets(QUESTIONS, (), questions_name="mine")
    asked = sets.logged()[0]
    with step_run("evaluate", "tiny") as run:
        log_sets(sets.logged())
        log_answers(version, QUESTIONS, measurement(RIGHT), None, asked)
    found = [
        given.dataset
        for run_id in (run.run_id, run_of_answers(version).info.run_id)
        for given in registry.client().get_run(run_id).inputs.dataset_inputs
    ]
    digest = sets.digests()["questions_sha256"][:36]
    assert [(given.name, given.digest) for given in found] == [("mine", digest)] * 2
    assert {"/" in given.source for given in found} == {False}, "no path of this machine"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("/home/me/mine.csv", "mine"),
        ("runs:/0123/questions.jsonl", "questions"),
        ("mlflow-dataset:tickets", "tickets"),
    ],
)
def test_a_set_is_called_as_its_file(source: str, name: str) -> None:
    assert set_name(source) == name


def test_questions_of_another_set_are_left_out(version: registry.VersionName) -> None:
    log_answers(version, QUESTIONS[:1], measurement(RIGHT))
    assert set(traces(version)) == {"q0"}


# --- a judge ----------------------------------------------------------------------------------


class JudgeServer(BaseHTTPRequestHandler):
    """Speaks as much of OpenAI's API as MLflow's judges need."""

    broken = False

    def do_GET(self) -> None:
        known = self.headers["Authorization"] == f"Bearer {KEY}"
        self._send(200 if known else 401, {"data": []})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.broken:
            key = self.headers["Authorization"].partition(" ")[2]
            self._send(400, {"error": {"message": f"no credit left on {key}"}})
            return
        opinion = {
            "rationale": "It says so.",
            "result": "yes" if SAYS_YES in body["messages"][-1]["content"] else "no",
        }
        message = {"role": "assistant", "content": json.dumps(opinion)}
        self._send(
            200,
            {
                "id": "1", "object": "chat.completion", "created": 1, "model": body["model"],
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
            },
        )  # fmt: skip

    def _send(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[JudgeServer]]:
    class Handler(JudgeServer):
        pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        monkeypatch.setenv("OPENAI_API_BASE", f"http://127.0.0.1:{listening.server_port}/v1")
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        yield Handler
        listening.shutdown()


JUDGE = JudgeSettings(model="openai:/judge-1", guidelines={"polite": "The answer is polite."})


def opinions(version: registry.VersionName, found: Measurement) -> dict[str, float]:
    check_judge(JUDGE)
    return log_answers(version, QUESTIONS, found, JUDGE)


@pytest.mark.usefixtures("server")
def test_a_judge_gives_metrics_and_an_assessment_an_answer(
    version: registry.VersionName, place: Workspace
) -> None:
    found = opinions(version, measurement(RIGHT))
    assert found == {"judge.correctness": 0.75, "judge.polite": 0.75}
    logged = traces(version)
    assert [values(logged[f"q{i}"])["judge.polite"] for i in range(2)] == ["no", "yes"]
    opinion = next(a for a in logged["q1"].info.assessments if a.name == "judge.correctness")
    assert opinion.source.source_type == "LLM_JUDGE"
    assert opinion.rationale == "It says so."
    assert run_of_answers(version).data.metrics["judge.polite"] == 0.75
    assert check_thresholds(found, {}).passed
    assert not check_thresholds(found, {"judge.polite": Bound(min=0.8)}).passed
    assert_no_key(place)


def test_a_judge_that_fails_gives_no_figure_and_shows_no_key(
    version: registry.VersionName,
    place: Workspace,
    server: type[JudgeServer],
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.broken = True
    found = opinions(version, measurement(RIGHT))
    assert found == {}
    told = capsys.readouterr().err
    assert "judge.polite: the judge failed on 4 of 4 answers" in told
    errors = [a.error for a in traces(version)["q0"].info.assessments if a.name == "judge.polite"]
    assert "no credit left on ***" in errors[0].error_message
    assert values(traces(version)["q0"])["correct"] is True
    assert KEY not in told
    assert_no_key(place)
    verdict = check_thresholds(found, {"judge.polite": Bound(min=0.1)})
    assert verdict.reasons == ["judge.polite was not measured; wanted >= 0.1"]


def assert_no_key(place: Workspace) -> None:
    files = [file for file in place.folder.rglob("*") if file.is_file()]
    assert files
    assert not [file for file in files if KEY.encode() in file.read_bytes()]


def test_a_key_that_is_refused_is_told_before_any_work(
    server: type[JudgeServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-another-secret")
    with pytest.raises(UserError, match=r"refuses the key .* \(HTTP 401\)") as error:
        check_judge(JUDGE)
    assert "sk-another" not in str(error.value)


@pytest.mark.parametrize(
    ("model", "key", "base", "kind", "told"),
    [
        ("openai:/m", None, None, UserError, "holds no OPENAI_API_KEY"),
        ("openai:/m", "text", "http://me:pw@127.0.0.1:9/v1", EnvironmentProblem, "not answer"),
        ("nobody:/m", None, None, UserError, "pip install litellm"),
    ],
)
def test_a_judge_that_cannot_be_asked_is_told_before_any_work(
    model: str,
    key: str | None,
    base: str | None,
    kind: type[Exception],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, value in (("OPENAI_API_KEY", key), ("OPENAI_API_BASE", base)):
        monkeypatch.delenv(name, raising=False)
        if value:
            monkeypatch.setenv(name, value)
    with pytest.raises(kind, match=told) as error:
        check_judge(JudgeSettings(model=model))
    assert "pw" not in str(error.value)


def test_without_a_judge_nothing_is_asked_for() -> None:
    check_judge(None)
