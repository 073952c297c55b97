"""`export` with keys and values in int8, and what is logged of it."""

from __future__ import annotations

import mlflow

from phi3_mlflow.config.parameters import read_request
from phi3_mlflow.genai.kept import kv_cache
from phi3_mlflow.pipeline.step import carry_out
from phi3_mlflow.stages import export, fetch, log, quantize
from tests.conftest import Workspace
from tests.fixtures.tiny_line import write_profile


def test_a_logged_model_with_keys_and_values_in_int8_answers(workspace: Workspace) -> None:
    plain = str(write_profile(workspace.folder))
    small = str(write_profile(workspace.folder, "small", runtime={"kv_cache": "int8"}))
    for step in (fetch, quantize, export):
        carry_out(step.STEP, read_request(step.STEP.parameters, {"profile": plain}))
    for step in (fetch, quantize, export, log):
        done = carry_out(step.STEP, read_request(step.STEP.parameters, {"profile": small}))
        assert done.hit == (step in (fetch, quantize)), step
        if step is export:
            assert kv_cache(done.entry.path) == "int8"
    (logged,) = done.record.models
    about = mlflow.models.get_model_info(logged.model_uri).flavors["python_function"]["config"]
    assert about["kv_cache"] == "int8"
    model = mlflow.pyfunc.load_model(logged.model_uri)
    request = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}
    first, again = (model.predict(request)["choices"][0]["message"] for _ in range(2))
    assert first == again
    assert first["role"] == "assistant"
