"""The embedded default, as its export and its checkpoint, behind both contracts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest

from phi3_mlflow.flavors.onnx import log_onnx
from phi3_mlflow.flavors.transformers import log_transformers

pytestmark = pytest.mark.slow

SPAIN = {"messages": [{"role": "user", "content": "What is the capital of Spain?"}]}
ATOM = (
    "<|system|>You are a stand-up comedian.<|end|>"
    "<|user|>Tell me a joke about atom<|end|><|assistant|>"
)


@pytest.fixture(scope="module")
def real(store: str, real_onnx: Path) -> Any:
    from tests.flavors.conftest import tracking

    with tracking(store):
        info = log_onnx(real_onnx, name="real")
        return mlflow.pyfunc.load_model(info.model_uri)


def test_the_requests_of_the_tutorial(real: Any, real_onnx: Path, real_checkpoint: Path) -> None:
    prompt = mlflow.pyfunc.load_model(log_onnx(real_onnx, name="p", contract="prompt").model_uri)
    torch = mlflow.pyfunc.load_model(
        log_transformers(real_checkpoint, name="t", dtype="auto").model_uri
    )
    comedian = [
        {"role": "system", "content": "You are a stand-up comedian."},
        {"role": "user", "content": "Tell me a joke about atom"},
    ]
    for model in (real, torch):
        for messages in (SPAIN["messages"], comedian):
            answer = model.predict({"messages": messages, "max_tokens": 24})
            assert answer["choices"][0]["message"]["content"].strip()
            assert answer["usage"]["completion_tokens"] <= 24
    spain = "<|user|>What is the capital of Spain?<|end|><|assistant|>"
    for text in (ATOM, spain):
        assert isinstance(prompt.predict({"prompt": text}, params={"max_tokens": 24}), str)


def test_a_conversation_that_crosses_4096_tokens_stays_the_same_warm_and_cold(real: Any) -> None:
    answerer = real.unwrap_python_model().answerer
    sentence = "The harbour of the town lies behind a long wall of stone. "
    said = [{"role": "user", "content": sentence * 310}]
    first = real.predict({"messages": said, "max_tokens": 40})
    assert 4000 < first["usage"]["prompt_tokens"] < 4096
    said.append({"role": "assistant", "content": first["choices"][0]["message"]["content"]})
    said.append({"role": "user", "content": sentence * 8 + "Where is the harbour?"})
    warm = real.predict({"messages": said, "max_tokens": 16})
    assert warm["usage"]["prompt_tokens"] > 4096
    answerer.prefixes._kept.clear()
    cold = real.predict({"messages": said, "max_tokens": 16})
    assert warm["choices"] == cold["choices"]


def test_logits_beyond_4096_tokens_do_not_depend_on_the_pieces(real: Any) -> None:
    """int4 rounds a single row in another way than several; beyond that nothing may move."""
    engine = real.unwrap_python_model().answerer.engine
    tokens = np.random.default_rng(0).integers(100, 40_000, 4160).tolist()
    found = []
    for piece in (64, 1040):
        session = engine.open(len(tokens))
        for start in range(0, len(tokens), piece):
            session.extend(tokens[start : start + piece])
        found.append(session.logits().copy())
    assert found[0].argmax() == found[1].argmax()
    assert np.abs(found[0] - found[1]).max() < 0.05
