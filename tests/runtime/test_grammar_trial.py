"""Grammars are tried where they can neither hold up nor end anybody."""

from __future__ import annotations

import json
import logging
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from phi3_mlflow.runtime import grammar_child, grammar_trial
from phi3_mlflow.runtime.engine import EngineSettings
from phi3_mlflow.runtime.engine_genai import GenaiEngine
from phi3_mlflow.runtime.grammar_trial import GrammarTrial
from phi3_mlflow.runtime.request import RequestError
from tests.conftest import ROOT

SOUND = json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}})
INTEGERS: dict[str, Any] = {"type": "array", "items": {"type": "integer"}}
CHEAP = {"grammar_s": 0.0, "token_s": 0.0}


@pytest.fixture(scope="module")
def tried(onnx_dir: Path) -> GrammarTrial:
    return GrammarTrial(onnx_dir)


class FakeChild:
    """Answers as it is told, and ends with a code when nothing is left."""

    guides = True

    def __init__(self, *answers: dict[str, Any], code: int = 0) -> None:
        self.owner = os.getpid()
        self.answers = list(answers)
        self.asked: list[str] = []
        self.code = code

    def ask(self, schema: str) -> dict[str, Any] | None:
        self.asked.append(schema)
        return self.answers.pop(0) if self.answers else None

    def end(self) -> int:
        return self.code


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[FakeChild]:
    """The processes that are started one after the other."""
    coming: list[FakeChild] = []
    monkeypatch.setattr(grammar_trial, "_Child", lambda folder: coming.pop(0))
    return coming


def test_the_graph_is_what_it_is_said_to_be() -> None:
    from onnx import TensorProto, helper

    def value(name: str, kind: int, shape: list[Any]) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    kinds, cache = ("key", "value"), ["b", 1, "p", 1]
    past = [value(f"past_key_values.0.{kind}", TensorProto.FLOAT, cache) for kind in kinds]
    present = [value(f"present.0.{kind}", TensorProto.FLOAT, cache) for kind in kinds]
    shape = struct.pack("<3q", 1, 1, 0x5EED)
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["input_ids"], ["ids"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["ids", "last"], ["one"]),
            helper.make_node("Expand", ["one", "shape"], ["logits"]),
            *(helper.make_node("Identity", [one.name], [other.name])
              for one, other in zip(past, present, strict=True)),
        ],
        "nothing",
        [value("input_ids", TensorProto.INT64, ["b", "s"]), *past],
        [value("logits", TensorProto.FLOAT, ["b", "s", "v"]), *present],
        [
            helper.make_tensor("last", TensorProto.INT64, [1], [2]),
            helper.make_tensor("shape", TensorProto.INT64, [3], shape, raw=True),
        ],
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert made.SerializeToString() == grammar_child._GRAPH


def test_what_can_be_followed_passes_and_the_rest_says_why(tried: GrammarTrial) -> None:
    assert tried.refusal(SOUND) is None
    assert "Invalid type: nonsense" in (tried.refusal('{"type": "nonsense"}') or "")
    assert "unclosed group" in (tried.refusal('{"type": "string", "pattern": "("}') or "")


def test_what_takes_too_much_memory_ends_another_process(tried: GrammarTrial) -> None:
    bomb = json.dumps({**INTEGERS, "minItems": 100_000_000})
    why = tried.refusal(bomb) or ""
    assert "its grammar takes more than 256 MB" in why or "its grammar takes more than 0.5" in why
    assert tried.knows(bomb)
    assert tried.refusal(json.dumps({"type": "boolean"})) is None, "there is a new process"


def test_what_takes_too_long_is_refused(onnx_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_trial, "MOST_BYTES", 2 << 30)
    monkeypatch.setattr(grammar_trial, "MOST_SECONDS", 0.01)
    why = GrammarTrial(onnx_dir).refusal(json.dumps({**INTEGERS, "minItems": 2_000_000}))
    assert why is not None
    assert why.startswith("its grammar takes")


@pytest.mark.parametrize("code", [signal.SIGALRM, signal.SIGKILL])
def test_a_process_that_has_ended_is_replaced(onnx_dir: Path, code: int) -> None:
    tried = GrammarTrial(onnx_dir)
    assert tried.refusal(SOUND) is None
    assert tried._child is not None
    tried._child._process.send_signal(code)
    tried._child._process.wait()
    assert tried.refusal('{"type": "nonsense"}') is not None
    assert tried.refusal('{"type": "null"}') is None


def test_it_does_not_outlive_its_owner(onnx_dir: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from phi3_mlflow.runtime.grammar_trial import GrammarTrial\n"
        "tried = GrammarTrial(Path(sys.argv[1])); assert tried.refusal(sys.argv[2]) is None\n"
        "print(tried._child._process.pid, flush=True); sys.stdin.read()"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code, str(onnx_dir), SOUND], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert owner.stdout is not None
    about = Path(f"/proc/{int(owner.stdout.readline())}/stat")
    assert about.exists()
    owner.kill()
    owner.communicate()
    for _ in range(6000):
        try:
            state = about.read_text().rpartition(")")[2].split()[0]
        except OSError:
            return
        if state == "Z":  # in a container nobody may collect it
            return
        signal.sigtimedwait([], 0.01)
    pytest.fail("the process is still there")


def test_a_schema_is_tried_once(children: list[FakeChild], tmp_path: Path) -> None:
    child = FakeChild(CHEAP, {"error": "no"})
    children.append(child)
    tried = GrammarTrial(tmp_path)
    assert not tried.knows("a")
    assert [tried.refusal(schema) for schema in "aabbab"] == [None, None, "no", "no", None, "no"]
    assert child.asked == ["a", "b"]
    assert tried.knows("a")


def test_what_is_remembered_is_bounded(
    children: list[FakeChild], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_trial, "_REMEMBERED", 2)
    children.append(FakeChild(*[CHEAP] * 3))
    tried = GrammarTrial(tmp_path)
    for schema in "abac":
        tried.refusal(schema)
    assert [tried.knows(schema) for schema in "abc"] == [True, False, True]


@pytest.mark.parametrize(
    ("cost", "why"),
    [
        ({"grammar_s": 0.6, "token_s": 0.0}, "its grammar takes 0.6 s, at most 0.5 s are taken"),
        ({"grammar_s": 0.1, "token_s": 0.7}, "a token that follows it takes 0.7 s"),
    ],
)
def test_slow_ones_are_refused(
    children: list[FakeChild], tmp_path: Path, cost: dict[str, Any], why: str
) -> None:
    children.append(FakeChild(cost))
    assert why in (GrammarTrial(tmp_path).refusal("a") or "")


@pytest.mark.parametrize(
    ("codes", "why", "known"),
    [
        ([-signal.SIGXCPU], "takes more than 0.5 s", True),
        ([-signal.SIGABRT], "takes more than 256 MB", True),
        ([-signal.SIGSEGV], "nested too deep", True),
        ([-signal.SIGKILL, -signal.SIGKILL], "the process that tried it ended", False),
        ([-signal.SIGALRM, -signal.SIGXCPU], "takes more than 0.5 s", True),
    ],
)
def test_how_it_ended_says_what_was_too_much(
    children: list[FakeChild], tmp_path: Path, codes: list[int], why: str, known: bool
) -> None:
    children += [FakeChild(code=code) for code in codes]
    tried = GrammarTrial(tmp_path)
    assert why in (tried.refusal("a") or "")
    assert tried.knows("a") == known
    assert not children


def test_where_no_process_can_be_started_the_rules_alone_decide(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tried = GrammarTrial(tmp_path)  # without a model
    with caplog.at_level(logging.WARNING):
        assert [tried.refusal(SOUND), tried.refusal(SOUND)] == [None, None]
    assert len(caplog.records) == 1, "it is not tried anew with every request"
    assert "genai_config.json" in caplog.text
    assert not tried.knows(SOUND)


def test_an_engine_refuses_by_name(onnx_dir: Path) -> None:
    engine = GenaiEngine(onnx_dir, EngineSettings(threads=1))
    with pytest.raises(RequestError, match="response_format: the JSON schema cannot be followed"):
        engine.try_schema('{"type": "nonsense"}')
    assert engine.knows('{"type": "nonsense"}')
    engine.try_schema(SOUND)
