"""Models as they are logged, behind the server: both flavors, and MLflow's own chat wrapper."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import openai
import pytest
import torch

from phi3_mlflow.flavors.onnx import log_onnx
from phi3_mlflow.flavors.transformers import log_transformers
from phi3_mlflow.genai.export import export_onnx
from phi3_mlflow.server.holder import Holder, load, resolve
from tests.conftest import Workspace, own_store
from tests.fixtures.tiny_phi3 import make_tiny
from tests.server.conftest import Running, running, wait_for

HELLO: Any = [{"role": "user", "content": "What is the capital of Spain?"}]
SCHEMA = {
    "type": "object",
    "properties": {"yes": {"type": "boolean"}, "mark": {"enum": ["a", "b"]}},
    "required": ["yes", "mark"],
    "additionalProperties": False,
    # A model of random weights would write white space to its limit.
    "x-guidance": {"whitespace_flexible": False},
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    with own_store(tmp_path_factory.mktemp("served")) as made:
        mlflow.set_tracking_uri(made.tracking_uri)
        experiment = mlflow.create_experiment("served", (made.folder / "artifacts").as_uri())
        mlflow.set_experiment(experiment_id=experiment)
        yield made


@pytest.fixture(scope="module")
def checkpoint(place: Workspace) -> Path:
    return make_tiny(place.folder / "checkpoint", sliding_window=None, max_position_embeddings=512)


def _serve(uri: str, batch: int = 8, **settings: Any) -> Any:
    holder = Holder(lambda: resolve(uri), lambda target: load(target, batch), follow_s=0.05)
    return running(holder, uri, batch=batch, **settings)


@pytest.fixture(scope="module")
def onnx(place: Workspace, checkpoint: Path) -> Iterator[Running]:
    folder = place.folder / "onnx"
    export_onnx(checkpoint, folder, precision="fp32")
    logged = log_onnx(folder, name="tiny", model_config={"threads": 1})
    mlflow.register_model(logged.model_uri, "tiny")
    mlflow.MlflowClient().set_registered_model_alias("tiny", "champion", "1")
    with _serve("models:/tiny@champion", trace="full") as up:
        yield up


@pytest.fixture(scope="module")
def transformers(place: Workspace, checkpoint: Path) -> Iterator[Running]:
    logged = log_transformers(
        checkpoint, name="tiny", dtype="float32", model_card="# Tiny\n", license_text="MIT\n"
    )
    with _serve(logged.model_uri) as up:
        yield up


@pytest.fixture(scope="module")
def plain(place: Workspace, checkpoint: Path) -> Iterator[Running]:
    """What MLflow's own `log_model` leaves, without this project's runtime."""
    logged = mlflow.transformers.log_model(
        transformers_model=str(checkpoint), name="plain", task="llm/v1/chat",
        torch_dtype=torch.float32, pip_requirements=["mlflow"],
    )  # fmt: skip
    with _serve(logged.model_uri) as up:
        yield up


def _chat(up: Running, **more: Any) -> Any:
    return up.openai().chat.completions.create(
        **{"model": up.context.holder.current.name, "messages": HELLO, "max_tokens": 6} | more
    )


@pytest.mark.slow
def test_both_flavors_say_the_same(onnx: Running, transformers: Running) -> None:
    for more in ({}, {"temperature": 1.5, "seed": 4, "n": 2}, {"logprobs": True}):
        one, other = _chat(onnx, **more), _chat(transformers, **more)
        assert [c.message for c in one.choices] == [c.message for c in other.choices]
        assert one.usage == other.usage
    one, other = (
        [token.logprob for token in _chat(up, logprobs=True).choices[0].logprobs.content]
        for up in (onnx, transformers)
    )
    assert one == pytest.approx(other, abs=1e-3)


def test_log_probabilities_add_up(onnx: Running) -> None:
    answer = _chat(onnx, logprobs=True, top_logprobs=20, temperature=1, seed=2)
    for token in answer.choices[0].logprobs.content:
        likeliest = [other.logprob for other in token.top_logprobs]
        assert likeliest == sorted(likeliest, reverse=True)
        assert token.logprob <= likeliest[0]
        chosen = [other.logprob for other in token.top_logprobs if other.bytes == token.bytes]
        assert not chosen or token.logprob in chosen or not token.bytes


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_follows_a_json_schema(onnx: Running, temperature: float) -> None:
    wanted = {"response_format": FORMAT, "max_tokens": 200, "temperature": temperature}
    found = set()
    for seed in range(3):
        choice = _chat(onnx, seed=seed, **wanted).choices[0]
        content = json.loads(choice.message.content)
        assert set(content) == {"yes", "mark"}
        assert isinstance(content["yes"], bool)
        assert content["mark"] in ("a", "b")
        assert choice.finish_reason == "stop"
        found.add(choice.message.content)
    again = _chat(onnx, seed=2, **wanted).choices[0].message.content
    assert again == choice.message.content, "the same seed says the same"
    assert len(found) == 1 or temperature, "greedy is greedy"


def test_a_schema_that_is_none_is_refused(onnx: Running) -> None:
    broken = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "nonsense"}}}
    with pytest.raises(openai.BadRequestError, match="cannot be followed") as caught:
        _chat(onnx, response_format=broken)
    assert caught.value.param == "response_format"
    assert _chat(onnx).choices


def test_the_other_flavor_says_that_it_follows_no_schema(transformers: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="the onnx flavor can"):
        _chat(transformers, response_format=FORMAT)


def test_the_next_turn_reuses_what_was_computed(onnx: Running) -> None:
    first = _chat(onnx).choices[0].message.content
    assert onnx.metric("phi3_prefix_cache_bytes") > 0
    turns = [*HELLO, {"role": "assistant", "content": first}, {"role": "user", "content": "Why?"}]
    assert _chat(onnx, messages=turns).usage.prompt_tokens > 20


def test_clients_at_once_are_answered_together_and_as_alone(onnx: Running) -> None:
    assert onnx.context.holder.current.backend.together == 8
    asked = [
        {"messages": [{"role": "user", "content": f"{n} words"}], "seed": n, "temperature": n % 2}
        for n in range(8)
    ]
    alone = [_chat(onnx, **one).choices[0].message.content for one in asked]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda one: _chat(onnx, **one), asked))
    assert [answer.choices[0].message.content for answer in together] == alone


def test_batches_can_be_switched_off(place: Workspace, onnx: Running) -> None:
    with _serve("models:/tiny/1", batch=1) as up:
        assert up.context.holder.current.backend.together == 1
        assert _chat(up).choices[0].message.content


def test_invocations_answer_as_mlflows_server_does(onnx: Running) -> None:
    http, model = onnx.http(), onnx.context.holder.current.model
    assert model is not None
    asked = {"messages": HELLO, "max_tokens": 5}
    answer = http.post("/invocations", json=asked)
    assert answer.headers["x-model-version"] == "1"
    assert answer.json()["choices"] == model.predict(asked)["choices"]
    rows = {"dataframe_records": [asked, {**asked, "max_tokens": 2}]}
    counted = http.post("/invocations", json=rows).json()["predictions"]
    assert [row["usage"]["completion_tokens"] for row in counted] == [5, 2]
    for bad, word in (
        ({**asked, "max_tokens": 0}, "max_tokens: 0 is below 1"),
        ({"messages": 7}, "schema"),
        ({"nothing": 1}, ""),
    ):
        refused = http.post("/invocations", json=bad)
        body = refused.json()
        assert refused.status_code == 400, bad
        assert (body["error_code"], body["error"]["type"]) == (
            "INVALID_PARAMETER_VALUE", "invalid_request_error",
        )  # fmt: skip
        assert word in body["message"]
        assert "stack_trace" not in body
        assert "Traceback" not in refused.text
    assert http.post("/invocations", content=b"{bad", headers={
        "Content-Type": "application/json"}).status_code == 400  # fmt: skip
    kind = {"Content-Type": "application/parquet"}
    assert http.post("/invocations", content=b"x", headers=kind).status_code == 415


def test_requests_are_traced(onnx: Running) -> None:
    answer = _chat(onnx, messages=[{"role": "user", "content": "Trace me"}])

    def traces() -> list[Any]:
        mlflow.flush_trace_async_logging()
        found = mlflow.search_traces(return_type="list", max_results=50)
        return [trace for trace in found if "Trace me" in str(trace.data.spans[0].inputs)]

    wait_for(traces, "a trace")
    (trace,) = traces()
    (span,) = trace.data.spans
    assert span.outputs == {"text": answer.choices[0].message.content}
    assert span.attributes["time_to_first_token_s"] > 0
    assert span.attributes["tokens_per_s"] > 0
    assert span.attributes["model_version"] == "1"
    assert trace.info.token_usage["output_tokens"] == answer.usage.completion_tokens


@pytest.mark.slow
def test_a_model_without_the_projects_front_does_what_it_can(plain: Running) -> None:
    whole = _chat(plain, max_tokens=5)
    text = whole.choices[0].message.content
    assert whole.usage.completion_tokens == 5
    assert whole.model == plain.context.holder.current.name, "not a path"
    streamed = _chat(plain, max_tokens=5, stream=True, temperature=0)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == text
    if len(text) > 2:
        cut = _chat(plain, max_tokens=5, stop=[text[2:4]]).choices[0]
        assert (cut.message.content, cut.finish_reason) == (text[: text.find(text[2:4])], "stop")
    for more in ({"n": 2}, {"seed": 1}, {"logprobs": True}, {"response_format": FORMAT}):
        with pytest.raises(openai.BadRequestError, match=f"{next(iter(more))}: this model was"):
            _chat(plain, **more)
    with pytest.raises(openai.BadRequestError, match="answers chats only"):
        plain.openai().completions.create(model=whole.model, prompt="Hello")


def test_an_alias_that_moves_in_the_registry(onnx: Running) -> None:
    client = mlflow.MlflowClient()
    source = client.get_model_version("tiny", "1").source
    client.create_model_version("tiny", source)
    client.set_registered_model_alias("tiny", "champion", "2")
    try:
        wait_for(lambda: onnx.http().get("/ping").headers["x-model-version"] == "2")
        raw = onnx.openai().chat.completions.with_raw_response.create(
            model="tiny", messages=HELLO, max_tokens=2
        )
        assert raw.headers["x-model-version"] == "2"
    finally:
        client.set_registered_model_alias("tiny", "champion", "1")
        wait_for(lambda: onnx.http().get("/ping").headers["x-model-version"] == "1")
