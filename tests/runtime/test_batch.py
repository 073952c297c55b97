"""Requests that are computed together: each gets what it would get alone, and leaves nothing."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phi3_mlflow.flavors.onnx import rope_switch
from phi3_mlflow.runtime.answerer import Answerer
from phi3_mlflow.runtime.batch_graph import BatchGraph
from phi3_mlflow.runtime.cancellation import Abandoned, abandoned_by
from phi3_mlflow.runtime.engine import EngineSettings, Session, cuts
from phi3_mlflow.runtime.engine_batch import BatchEngine
from phi3_mlflow.runtime.engine_genai import GenaiEngine, GenaiSession
from phi3_mlflow.runtime.engines import onnx_engine
from phi3_mlflow.runtime.model_config import ModelConfig
from phi3_mlflow.runtime.python_model import ChatPythonModel
from phi3_mlflow.runtime.scheduler import BatchSession
from tests.fixtures.tiny_checkpoints import CONTEXT, exported
from tests.runtime.test_engines import CLOSE, _reference, _tokens

ROWS = 4


def _engine(checkpoint: Path, **more: Any) -> BatchEngine:
    onnx_dir = exported(checkpoint)
    settings = EngineSettings(threads=1, batch=ROWS, rope_switch=rope_switch(onnx_dir), **more)
    return BatchEngine(onnx_dir, settings)


def _model(engine: BatchEngine, **config: Any) -> ChatPythonModel:
    model = ChatPythonModel()
    model.answerer = Answerer(engine, ModelConfig(batch=ROWS, **config))
    return model


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> BatchEngine:
    return _engine(checkpoint)


@pytest.fixture
def model(engine: BatchEngine) -> Iterator[ChatPythonModel]:
    yield _model(engine)
    assert not any(engine._scheduler._slots), "a row was not given back"


def _ask(text: str, tokens: int = 12, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": tokens, **more}


def _text(answer: dict[str, Any]) -> str:
    return answer["choices"][0]["message"]["content"]


@pytest.mark.parametrize("model", ["checkpoint", "windowed"])
@pytest.mark.parametrize("length", [1, 2, 31, 500, 2047, 2050, 4097])
def test_prompts_of_all_lengths_give_the_logits_of_transformers(
    request: pytest.FixtureRequest, model: str, length: int
) -> None:
    checkpoint = request.getfixturevalue(model)
    engine, tokens = _engine(checkpoint), _tokens(length + 3)
    session = engine.open(CONTEXT)
    for start, end in _pieces(cuts(tokens[:length], engine.ends, 64, 0)):
        session.extend(tokens[start:end])
    for token in tokens[length:]:
        session.extend([token])
    assert np.abs(session.logits() - _reference(checkpoint, tokens)).max() < CLOSE


def _pieces(ends: list[int]) -> Iterator[tuple[int, int]]:
    return zip([0, *ends], ends, strict=False)


REQUESTS = st.lists(
    st.fixed_dictionaries(
        {
            "text": st.text("abc .", min_size=1, max_size=90),
            "tokens": st.integers(1, 20),
            "temperature": st.sampled_from([0.0, 0.9]),
        }
    ),
    min_size=2,
    max_size=7,
)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(REQUESTS)
def test_an_answer_does_not_depend_on_what_is_computed_beside_it(
    model: ChatPythonModel, wanted: list[dict[str, Any]]
) -> None:
    asked = [
        _ask(one["text"], one["tokens"], temperature=one["temperature"], seed=index)
        for index, one in enumerate(wanted)
    ]
    together = model.predict(None, asked)
    assert [_text(answer) for answer in together] == [
        _text(model.predict(None, one)) for one in asked
    ]


def test_logits_do_not_depend_on_what_is_computed_beside_them(engine: BatchEngine) -> None:
    def steps(start: int, pause: threading.Barrier | None) -> list[np.ndarray]:
        tokens = _tokens(40 + start, seed=start)
        session = engine.open(CONTEXT)
        session.extend(tokens[:start])
        found = []
        for token in tokens[start:]:
            if pause:
                pause.wait()
            session.extend([token])
            found.append(session.logits())
        session.rest(0)
        return found

    starts = [3, 8, 21, 300]
    alone = [steps(start, None) for start in starts]
    barrier = threading.Barrier(len(starts))
    with ThreadPoolExecutor(len(starts)) as threads:
        together = list(threads.map(lambda start: steps(start, barrier), starts))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


def test_tokens_that_wait_at_the_same_time_are_computed_in_one_call(
    engine: BatchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = [engine.open(CONTEXT) for _ in range(ROWS)]
    for index, session in enumerate(sessions):
        session.extend(_tokens(10, seed=index))
    shapes = _shapes(monkeypatch)
    first_is_computed, others_wait = BatchGraph.run, threading.Event()

    def run(self: BatchGraph, *what: Any) -> np.ndarray:
        others_wait.wait(10)
        return first_is_computed(self, *what)

    monkeypatch.setattr(BatchGraph, "run", run)
    with ThreadPoolExecutor(ROWS) as threads:
        jobs = [threads.submit(session.extend, [9]) for session in sessions]
        for _ in range(1000):
            if len(engine._scheduler._jobs) == ROWS - 1:  # one thread computes already
                break
            time.sleep(0.01)
        others_wait.set()
        for job in jobs:
            job.result()
    for session in sessions:
        session.rest(0)
    assert shapes == [(ROWS, 1)] * 2, "the one that came first, then all that waited"


def _shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of what the graph is given from now on: rows, tokens."""
    shapes: list[tuple[int, ...]] = []
    before = BatchGraph.run

    def run(self: BatchGraph, first: int, tokens: np.ndarray, lengths: list[int]) -> np.ndarray:
        shapes.append(tokens.shape)
        return before(self, first, tokens, lengths)

    monkeypatch.setattr(BatchGraph, "run", run)
    return shapes


def test_more_requests_than_rows_are_all_answered(model: ChatPythonModel) -> None:
    asked = [_ask(f"question {number}", number + 1) for number in range(3 * ROWS)]
    with ThreadPoolExecutor(len(asked)) as threads:
        answers = list(threads.map(lambda one: model.predict(None, one), asked))
    assert [answer["usage"]["completion_tokens"] for answer in answers] == list(
        range(1, 3 * ROWS + 1)
    )


def test_a_second_turn_computes_only_what_is_new_and_says_the_same(
    engine: BatchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _ask("a" * 300, 4)
    again = {**first, "messages": [*first["messages"], *_ask("and now?")["messages"]]}
    cold = _text(_model(engine).predict(None, again))
    warm = _model(engine)
    warm.predict(None, first)
    shapes = _shapes(monkeypatch)
    assert _text(warm.predict(None, again)) == cold
    prompt = sum(tokens for _, tokens in shapes if tokens > 1)
    assert 0 < prompt < 128, "of more than 300"
    assert 0 < warm.live().kept_bytes() < 1000 * engine.token_bytes


def test_nothing_is_kept_without_a_budget(engine: BatchEngine) -> None:
    model = _model(engine, prefix_cache_mb=0)
    first = model.predict(None, _ask("a" * 300, 4))
    assert model.live().kept_bytes() == 0
    assert _text(model.predict(None, _ask("a" * 300, 4))) == _text(first), "nothing to go on with"


def test_a_long_request_makes_room_while_others_are_answered(checkpoint: Path) -> None:
    short, long = _ask("short", 60, temperature=0.8, seed=1), _ask("long " * 300, 30)
    model = _model(_engine(checkpoint))
    assert model.answerer is not None
    expected = [_text(_model(_engine(checkpoint)).predict(None, one)) for one in (short, long)]
    stream = model.predict_stream(None, short)
    begun = [next(stream) for _ in range(10)]
    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(model.predict, None, long)
        chunks = [*begun, *stream]
    pieces = [c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"]]
    assert ["".join(pieces), _text(other.result())] == expected


@pytest.mark.parametrize("more", [0, 1])
def test_the_context_can_be_filled_to_the_last_token(checkpoint: Path, more: int) -> None:
    engine = _engine(checkpoint, max_context=96)
    model = _model(engine)
    assert model.answerer is not None
    wanted = model.live().parse(_ask("x" * (40 + more)))
    used = len(model.answerer.prepare(wanted).tokens)
    asked = _ask("x" * (40 + more), 96 - used, temperature=1.0)
    for answer in model.predict(None, [{**asked, "seed": seed} for seed in range(ROWS)]):
        assert answer["usage"]["total_tokens"] <= 96
    assert not any(engine._scheduler._slots)


def test_a_client_that_leaves_gives_its_row_back(
    engine: BatchEngine, model: ChatPythonModel
) -> None:
    left = threading.Event()
    with abandoned_by(left):
        parts = model.live().begin(model.live().parse(_ask("hello", 500))).parts()
        next(parts)
        left.set()
        with pytest.raises(Abandoned):
            list(parts)
    assert not any(engine._scheduler._slots)
    assert model.live().kept_bytes() > 0, "what was computed stays good"


def test_a_failure_reaches_those_it_concerns_and_the_engine_goes_on(
    engine: BatchEngine, model: ChatPythonModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _text(model.predict(None, _ask("hello")))

    def run(self: BatchGraph, *_: Any) -> np.ndarray:
        raise MemoryError("no room")

    with monkeypatch.context() as broken:
        broken.setattr(BatchGraph, "run", run)
        with ThreadPoolExecutor(ROWS) as threads:
            failed = [
                threads.submit(model.predict, None, _ask(f"{number} hello"))
                for number in range(ROWS)
            ]
        assert all(isinstance(one.exception(), MemoryError) for one in failed)
    assert not engine._scheduler._jobs
    assert _text(model.predict(None, _ask("hello"))) == expected


@pytest.mark.parametrize("leaving", ["load", "reserve"])
def test_a_failure_to_make_room_is_an_error_of_the_request(
    engine: BatchEngine, model: ChatPythonModel, monkeypatch: pytest.MonkeyPatch, leaving: str
) -> None:
    ask = _ask("b" * 200)
    expected = _text(model.predict(None, ask))  # so that there is something to load

    def fail(self: BatchGraph, *_: Any) -> None:
        raise MemoryError("no room")

    with monkeypatch.context() as broken:
        broken.setattr(BatchGraph, leaving, fail)
        with pytest.raises(MemoryError):
            model.predict(None, ask)
    assert not engine._scheduler._jobs
    assert _text(model.predict(None, ask)) == expected


def test_the_memory_of_a_row_is_given_back(engine: BatchEngine) -> None:
    graph = engine._scheduler._graph
    session = engine.open(CONTEXT)
    session.extend(_tokens(3000))
    assert isinstance(session, BatchSession)
    assert session.slot is not None
    row = session.slot
    assert any(memory.array[row].any() for memory in graph._memory)
    session.rest(0)
    page = 4096 // 4  # floats; a page that is shared with the next row stays
    for memory in graph._memory:
        assert not memory.array[row].reshape(-1)[page:-page].any()


def test_longrope_beyond_its_switch_is_left_to_onnxruntime_genai(longrope: Path) -> None:
    engine = _engine(longrope)
    switch = engine.rope_switch
    assert isinstance(engine.open(switch), BatchSession)
    assert isinstance(engine.open(switch + 1), GenaiSession)
    onnx_dir = exported(longrope)
    turns = GenaiEngine(onnx_dir, EngineSettings(threads=1, rope_switch=switch))
    for tokens in (_tokens(20), _tokens(60)):
        texts = [_greedy(e.open(len(tokens) + 8), tokens, switch) for e in (engine, turns)]
        assert texts[0] == texts[1]


def _greedy(session: Session, tokens: list[int], switch: int) -> list[int]:
    done = 0
    for end in cuts(tokens, (), 64, switch):
        session.extend(tokens[done:end])
        done = end
    found: list[int] = []
    for _ in range(6):
        found.append(session.follow(found[-1] if found else None))
    return found


def test_an_answer_by_a_schema_stands_beside_the_others(model: ChatPythonModel) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    wanted = {
        **_ask("x", 40),
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
    }
    live = model.live()

    def answer(request: dict[str, Any]) -> str:
        return "".join(part.text for part in live.begin(live.parse(request)).parts())

    with ThreadPoolExecutor(3) as threads:
        texts = list(threads.map(answer, [wanted, _ask("plain", 30), _ask("other", 30)]))
    assert '"a"' in texts[0]
    assert texts[1:] == [answer(_ask("plain", 30)), answer(_ask("other", 30))]


def test_a_model_that_cannot_be_batched_answers_in_turns(
    onnx_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(BatchGraph, "_check", _refuse)
    with caplog.at_level(logging.WARNING):
        engine = onnx_engine(onnx_dir, EngineSettings(threads=1, batch=4))
    assert type(engine) is GenaiEngine
    assert "requests take turns, because the model has three heads" in caplog.text


def _refuse(self: BatchGraph) -> None:
    from phi3_mlflow.runtime.batch_graph import NotBatchable

    raise NotBatchable("has three heads")
