"""Each shipped profile, with a tiny random model of its architecture in the place of the real."""

from __future__ import annotations

import mlflow
import pytest
import yaml

from phi3_mlflow.config.loading import PROFILE_DIRECTORY, load_profile, profile_names
from phi3_mlflow.config.parameters import read_request
from phi3_mlflow.pipeline.step import carry_out
from phi3_mlflow.sources.spec import parse_source
from phi3_mlflow.stages import export, fetch, log, quantize
from tests.conftest import Workspace
from tests.fixtures.tiny_line import write_profile
from tests.fixtures.tiny_phi3 import ARCHITECTURES, make_tiny

PHI = [name for name in profile_names() if name.startswith("phi-")]


def test_every_phi_profile_has_its_architecture_under_test() -> None:
    assert set(PHI) == set(ARCHITECTURES)


@pytest.mark.parametrize("name", PHI)
def test_a_phi_profile_is_pinned_licensed_and_has_a_budget(name: str) -> None:
    profile = load_profile(name)
    source = parse_source(profile.source)
    assert source.pinned, profile.source
    assert profile.licence == "MIT"
    assert profile.search.budget.data_bytes
    assert {"kl_mean", "top1_agreement"} <= set(profile.gate.thresholds)
    assert (profile.runtime.max_context or profile.context_length) <= profile.context_length


@pytest.mark.slow
@pytest.mark.parametrize("name", PHI)
def test_a_phi_profile_goes_from_fetch_to_a_chat_answer(name: str, workspace: Workspace) -> None:
    checkpoint = make_tiny(workspace.folder / "checkpoint", name)
    real = yaml.safe_load((PROFILE_DIRECTORY / f"{name}.yaml").read_text())
    tiny = load_profile(str(write_profile(workspace.folder)))
    # All of the real profile but its source, its sizes and its sets.
    profile = write_profile(
        workspace.folder,
        name=name,
        **{
            **{k: v for k, v in real.items() if k not in ("source", "runtime", "gate")},
            "source": f"file:{checkpoint}",
            "context_length": 128,
            "evaluation": tiny.evaluation.model_dump(exclude={"judge"}),
            "quantization": {**real["quantization"], "block_size": 16},
        },
    )
    for module in (fetch, quantize, export, log):
        request = read_request(module.STEP.parameters, {"profile": str(profile)})
        done = carry_out(module.STEP, request)
    (logged,) = done.record.models
    model = mlflow.pyfunc.load_model(logged.model_uri)
    answer = model.predict({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5})
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert 1 <= answer["usage"]["completion_tokens"] <= 5
