from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pandas as pd
import pytest

from phi3_mlflow.runtime.engine import cuts
from phi3_mlflow.runtime.fair_lock import FairLock
from phi3_mlflow.runtime.model_config import ModelConfig
from phi3_mlflow.runtime.request import RequestError
from tests.runtime.scripted import ScriptedEngine, model_on


def _ask(content: str = "Question?", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], **more}


def _text(answer: dict[str, Any], choice: int = 0) -> str:
    return answer["choices"][choice]["message"]["content"]


def test_an_answer_that_ends_by_itself() -> None:
    answer = model_on(ScriptedEngine("Good day."), model_name="m").predict(None, _ask())
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Good day."},
            "finish_reason": "stop",
        }
    ]
    prompt = len("uQuestion?") + 1
    assert answer["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": 10,  # nine letters and the token that ends the turn
        "total_tokens": prompt + 10,
    }
    assert (answer["object"], answer["model"]) == ("chat.completion", "m")
    assert answer["id"].startswith("chatcmpl-")
    assert isinstance(answer["created"], int)


@pytest.mark.parametrize(
    ("limit", "text", "reason", "tokens"),
    [(1, "a", "length", 1), (3, "abc", "length", 3), (4, "abc", "stop", 4), (9, "abc", "stop", 4)],
)
def test_max_tokens_counts_new_tokens(limit: int, text: str, reason: str, tokens: int) -> None:
    answer = model_on(ScriptedEngine("abc")).predict(None, _ask(max_tokens=limit))
    assert (_text(answer), answer["choices"][0]["finish_reason"]) == (text, reason)
    assert answer["usage"]["completion_tokens"] == tokens


@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        (["four"], "one two three ", "stop"),
        (["three", "two"], "one ", "stop"),
        (["o t"], "one tw", "stop"),
        (["e t"], "on", "stop"),
        (["fourth"], "one two three fou", "length"),
    ],
)
def test_a_stop_text_ends_the_answer_wherever_tokens_begin(
    stop: list[str], text: str, reason: str
) -> None:
    limit = len(text) if reason == "length" else 100
    wanted = _ask(stop=stop, max_tokens=limit)
    answer = model_on(ScriptedEngine("one two three four")).predict(None, wanted)
    assert (_text(answer), answer["choices"][0]["finish_reason"]) == (text, reason)


def test_every_choice_is_answered_and_counted() -> None:
    answer = model_on(ScriptedEngine("ab")).predict(None, _ask(n=3))
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert [_text(answer, i) for i in range(3)] == ["ab"] * 3
    assert answer["usage"]["completion_tokens"] == 9


def test_every_row_is_answered_in_its_place() -> None:
    frame = pd.DataFrame([_ask("a", max_tokens=2), _ask("bcd", max_tokens=1)])
    first, second = model_on(ScriptedEngine("xyz")).predict(None, frame)
    assert (_text(first), _text(second)) == ("xy", "x")
    assert second["usage"]["prompt_tokens"] == first["usage"]["prompt_tokens"] + 2


def test_a_mistake_in_one_row_is_found_before_any_is_answered() -> None:
    engine = ScriptedEngine("x")
    with pytest.raises(RequestError, match=r"row 1: temperature: -1 is not"):
        model_on(engine).predict(None, [_ask(), _ask(temperature=-1)])
    with pytest.raises(RequestError, match=r"messages: 202 tokens leave no room"):
        model_on(engine).predict(None, [_ask(), _ask("y" * 200)])
    assert engine.opened == 0


def test_the_context_bounds_prompt_and_answer_together() -> None:
    model = model_on(ScriptedEngine(), max_tokens=150)
    room = 200 - len("uQuestion?") - 1
    answer = model.predict(None, _ask(max_tokens=room))
    assert answer["usage"]["total_tokens"] == 200
    with pytest.raises(RequestError, match=rf"max_tokens: {room + 1} .* at most {room} are left"):
        model.predict(None, _ask(max_tokens=room + 1))
    long = model.predict(None, _ask("z" * 190))
    assert long["usage"]["completion_tokens"] == 8, "the default fills what is left"


def test_a_refused_request_leaves_the_model_answering() -> None:
    model = model_on(ScriptedEngine("fine"))
    for bad in (_ask(max_tokens=0), {"messages": []}, _ask("a\0")):
        with pytest.raises(RequestError):
            model.predict(None, bad)
        assert _text(model.predict(None, _ask())) == "fine"


def test_params_take_precedence_over_the_row() -> None:
    model = model_on(ScriptedEngine("abc"))
    answer = model.predict(None, _ask(max_tokens=3), params={"max_tokens": 1, "seed": None})
    assert _text(answer) == "a"


def test_a_stream_says_what_the_whole_answer_says() -> None:
    model = model_on(ScriptedEngine("one two"), model_name="m")
    wanted = _ask(n=2, stop=["two"])
    whole, chunks = model.predict(None, wanted), list(model.predict_stream(None, wanted))
    assert len({(c["id"], c["created"], c["object"], c["model"]) for c in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"
    *parts, last = chunks
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    for index in range(2):
        mine = [c["choices"][0] for c in parts if c["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(c["delta"].get("content", "") for c in mine) == _text(whole, index)
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + ["stop"]
        assert len(mine) > 3, "in pieces"


def test_a_stream_that_is_left_gives_its_session_back() -> None:
    engine = ScriptedEngine()
    model = model_on(engine)
    stream = model.predict_stream(None, _ask("w" * 150))
    for _ in range(4):
        next(stream)
    assert model.answerer is not None
    assert model.answerer.prefixes.kept_bytes() == 0
    stream.close()
    assert model.answerer.prefixes.kept_bytes() > 0


def test_a_stream_answers_one_request() -> None:
    with pytest.raises(RequestError, match="one request at a time"):
        model_on(ScriptedEngine("a")).predict_stream(None, [_ask(), _ask()])


def test_the_plain_contract_takes_and_gives_texts() -> None:
    model = model_on(ScriptedEngine("well"), "prompt")
    assert model.predict(None, {"prompt": "<|user|>x"}) == "well"
    assert model.predict(None, ["ab", "cd"], params={"max_tokens": 2}) == ["we", "we"]
    assert "".join(model.predict_stream(None, {"prompt": "xy"})) == "well"
    with pytest.raises(RequestError, match="prompt: expected a text"):
        model.predict(None, {"messages": []})


class _Broken(ScriptedEngine):
    broken = False

    def open(self, capacity: int) -> Any:
        session = super().open(capacity)
        session.extend_ = session.extend

        def extend(tokens: Sequence[int]) -> None:
            if self.broken and len(tokens) == 1:
                raise MemoryError
            session.extend_(tokens)

        session.extend = extend
        return session


def test_a_session_that_failed_is_not_used_again() -> None:
    engine = _Broken("abc")
    model = model_on(engine)
    engine.broken = True
    with pytest.raises(MemoryError):
        model.predict(None, _ask())
    engine.broken = False
    assert _text(model.predict(None, _ask())) == "abc"
    assert engine.opened == 2


def test_config_is_checked_by_name() -> None:
    assert ModelConfig.read({"threads": 2, "temperature": 1}).threads == 2
    with pytest.raises(ValueError, match="thread: no such value; max_tokens: 0 is too small"):
        ModelConfig.read({"thread": 2, "max_tokens": 0})
    with pytest.raises(ValueError, match="threads: expected int, found 'two'"):
        ModelConfig.read({"threads": "two"})


def test_a_short_request_gets_its_turns_beside_a_long_one() -> None:
    """In every stretch of work the short request comes every second time, so it ends early."""
    work: list[str] = []
    started, go = threading.Event(), threading.Event()

    def note(tokens: Sequence[int]) -> None:
        name = threading.current_thread().name
        if name == "long" and work.count("long") == 5:
            started.set()
            go.wait(10)
        work.append(name)

    model = model_on(ScriptedEngine(on_extend=note), prefix_cache_mb=0)

    def ask(tokens: int) -> None:
        model.predict(None, _ask(max_tokens=tokens))

    long = threading.Thread(target=ask, args=(180,), name="long")
    short = threading.Thread(target=ask, args=(5,), name="short")
    long.start()
    assert started.wait(10)
    short.start()
    assert model.answerer is not None
    lock: FairLock = model.answerer._lock
    while not lock._waiting:  # the short request stands in line
        short.join(0.001)
    go.set()
    short.join(10)
    long.join(10)
    assert work.count("short") == 5
    last = len(work) - work[::-1].index("short")
    assert last < 40, "a short request ends long before the long one does"


def test_turns_go_to_the_one_who_waited_longest_and_survive_errors() -> None:
    lock, order, ready = FairLock(), [], []
    with lock:
        for name in range(4):
            gate = threading.Event()

            def run(name: int = name, gate: threading.Event = gate) -> None:
                gate.set()
                with lock:
                    order.append(name)
                    if name == 1:
                        raise KeyError(name)

            def guarded(run: Any = run) -> None:
                with pytest.raises(KeyError) if run.__defaults__[0] == 1 else _nothing():
                    run()

            thread = threading.Thread(target=guarded)
            thread.start()
            gate.wait(10)
            while len(lock._waiting) <= name:
                thread.join(0.001)
            ready.append(thread)
    for thread in ready:
        thread.join(10)
    assert order == [0, 1, 2, 3]
    with lock:
        order.append(4)


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def test_cuts_depend_only_on_what_comes_before_them() -> None:
    tokens = [*range(10, 40), 1, *range(40, 62), 1, *range(62, 262)]
    whole = cuts(tokens, {1}, 64, 0)
    # The first turn is too short for a piece of its own.
    assert whole == [54, 118, 182, 246, 254]
    for length in range(1, len(tokens)):
        part = cuts(tokens[:length], {1}, 64, 0)
        assert part[-1] == length
        assert part[:-1] == [cut for cut in whole if cut < length]


def test_a_prompt_beyond_the_longrope_switch_is_one_piece() -> None:
    assert cuts(list(range(100)), set(), 64, 99) == [100]
    assert cuts(list(range(100)), set(), 64, 100) == [64, 100]
