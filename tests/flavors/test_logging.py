"""What is logged: an ordinary MLflow model that is complete, written once, and tells no paths."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
import yaml
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PyFuncModel
from mlflow.types.llm import (
    CHAT_MODEL_INPUT_SCHEMA,
    CHAT_MODEL_OUTPUT_SCHEMA,
    ChatCompletionChunk,
    ChatCompletionResponse,
)

from phi3_mlflow.core.errors import UserError
from phi3_mlflow.flavors.bundle import requirements
from phi3_mlflow.flavors.onnx import log_onnx
from phi3_mlflow.flavors.transformers import log_transformers
from phi3_mlflow.runtime.engine import LEAST_PIECE

SPAIN = {"messages": [{"role": "user", "content": "What is the capital of Spain?"}]}
ATOM = (
    "<|system|>You are a stand-up comedian.<|end|>"
    "<|user|>Tell me a joke about atom<|end|><|assistant|>"
)


def _folder(info: Any) -> Path:
    return Path(mlflow.artifacts.download_artifacts(info.model_uri))


def _text(answer: dict[str, Any]) -> str:
    return answer["choices"][0]["message"]["content"]


def test_both_flavors_have_the_signature_of_mlflows_chat_schema(
    onnx_info: Any, transformers_info: Any
) -> None:
    assert onnx_info.signature == transformers_info.signature
    assert onnx_info.signature.inputs == CHAT_MODEL_INPUT_SCHEMA
    assert onnx_info.signature.outputs == CHAT_MODEL_OUTPUT_SCHEMA
    assert [param.name for param in onnx_info.signature.params] == ["seed"]


def test_both_flavors_answer_in_the_same_shape(model: PyFuncModel) -> None:
    answer = model.predict({**SPAIN, "max_tokens": 5})
    parsed = ChatCompletionResponse.from_dict(answer)
    assert parsed.to_dict() == answer, "no field that OpenAI's answer does not have"
    assert (parsed.model, parsed.object) == ("tiny", "chat.completion")
    assert parsed.choices[0].finish_reason == "length"
    assert parsed.choices[0].message.role == "assistant"
    prompt = len("<u>") - 2 + len(SPAIN["messages"][0]["content"]) + 2
    assert parsed.usage is not None
    assert parsed.usage.to_dict() == {
        "prompt_tokens": prompt,  # the letters, and the tags of user, end and assistant
        "completion_tokens": 5,
        "total_tokens": prompt + 5,
    }


def test_both_flavors_stream_chunks(model: PyFuncModel) -> None:
    wanted = {**SPAIN, "max_tokens": 20}
    chunks = list(model.predict_stream(wanted))
    for chunk in chunks:
        parsed = ChatCompletionChunk.from_dict(chunk)
        assert (parsed.object, parsed.model) == ("chat.completion.chunk", "tiny")
    pieces = [c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"]]
    assert "".join(pieces) == _text(model.predict(wanted))
    assert chunks[-1]["usage"]["completion_tokens"] == 20


def test_both_flavors_compute_the_same_answers(
    onnx_model: PyFuncModel, transformers_model: PyFuncModel
) -> None:
    """The tiny model is exported in float32, so that only the serving could tell them apart."""
    turns = [{"role": "system", "content": "Short."}, *SPAIN["messages"]]
    turns += [{"role": "assistant", "content": "Ma"}, {"role": "user", "content": "Sure?"}]
    for wanted in (
        {**SPAIN, "max_tokens": 30},
        {"messages": turns, "max_tokens": 30},
        {**SPAIN, "max_tokens": 30, "temperature": 0.8, "n": 2, "custom_inputs": {"seed": 3}},
        {**SPAIN, "max_tokens": 30, "frequency_penalty": 1.5, "temperature": 0},
    ):
        one, other = onnx_model.predict(wanted), transformers_model.predict(wanted)
        assert one["choices"] == other["choices"]
        assert one["usage"] == other["usage"]
        assert one.keys() == other.keys()


def test_seeds_repeat_an_answer(model: PyFuncModel) -> None:
    wanted = {**SPAIN, "max_tokens": 12, "temperature": 1.5}

    def ask(**more: Any) -> str:
        return _text(model.predict({**wanted, **more.pop("row", {})}, **more))

    assert ask(params={"seed": 4}) == ask(params={"seed": 4})
    assert ask(params={"seed": 4}) == ask(row={"custom_inputs": {"seed": 4}})
    assert len({ask() for _ in range(6)}) > 1
    assert len({ask(params={"seed": s}) for s in range(6)}) > 1


def test_every_row_of_a_data_frame_is_answered(model: PyFuncModel) -> None:
    frame = pd.DataFrame([{**SPAIN, "max_tokens": n} for n in (1, 4, 2)])
    answers = model.predict(frame)
    assert [a["usage"]["completion_tokens"] for a in answers] == [1, 4, 2]


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "role"),
        ({"messages": [{"role": "user", "content": 5}]}, "content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "content"),
        ({"messages": [{"role": "user", "content": None}]}, "content"),
        ({"messages": [{"role": "user", "content": "a", "mood": "b"}]}, "mood"),
        ({"messages": [{"role": "user", "content": "a\0"}]}, r"content: holds a NUL"),
        ({"messages": [{"role": "user", "content": "a\udc00"}]}, "surrogate"),
        ({"messages": [{"role": "user", "content": "x" * 10_000_000}]}, r"messages: 10000000 ch"),
        ({"messages": [{"role": "user", "content": "x" * 7000}]}, r"messages: 7003 tokens leave"),
        ({**SPAIN, "max_tokens": 0}, "max_tokens: 0 is below 1"),
        ({**SPAIN, "max_tokens": -1}, "max_tokens: -1 is below 1"),
        ({**SPAIN, "max_tokens": 6144}, "max_tokens: 6144 new tokens and 32 of the prompt"),
        ({**SPAIN, "temperature": -1.0}, r"temperature: -1\.0 is not between 0 and 2"),
        ({**SPAIN, "temperature": -1}, "temperature"),
        ({**SPAIN, "stop": "x"}, "stop|list"),
    ],
)
def test_a_bad_request_names_its_field_and_the_model_goes_on(
    model: PyFuncModel, fields: dict[str, Any], names: str
) -> None:
    with pytest.raises(MlflowException, match=names) as caught:
        model.predict(json.loads(json.dumps(fields)))
    assert caught.value.get_http_status_code() == 400
    assert _text(model.predict({**SPAIN, "max_tokens": 1})) is not None


def test_an_unknown_field_is_ignored(model: PyFuncModel) -> None:
    plain = model.predict({**SPAIN, "max_tokens": 3})
    more = model.predict({**SPAIN, "max_tokens": 3, "logit_bias": {"5": 1}, "user": "me"})
    assert more["choices"] == plain["choices"]


def test_the_plain_contract(prompt_model: PyFuncModel) -> None:
    answer = prompt_model.predict({"prompt": ATOM}, params={"max_tokens": 8})
    assert isinstance(answer, str)
    spain = "<|user|>What is the capital of Spain?<|end|><|assistant|>"
    both = prompt_model.predict(pd.DataFrame({"prompt": [ATOM, spain]}), params={"max_tokens": 8})
    assert both[0] == answer
    assert isinstance(both[1], str)
    assert "".join(prompt_model.predict_stream({"prompt": ATOM}, {"max_tokens": 8})) == answer
    with pytest.raises(MlflowException, match="prompt"):
        prompt_model.predict({"prompt": ""})


def test_both_contracts_read_a_conversation_alike(
    prompt_model: PyFuncModel, onnx_model: PyFuncModel
) -> None:
    comedian = [
        {"role": "system", "content": "You are a stand-up comedian."},
        {"role": "user", "content": "Tell me a joke about atom"},
    ]
    chat = onnx_model.predict({"messages": comedian, "max_tokens": 16})
    assert prompt_model.predict({"prompt": ATOM}, params={"max_tokens": 16}) == _text(chat)


def test_values_of_model_config_can_be_overridden_at_load_time(onnx_info: Any) -> None:
    small = mlflow.pyfunc.load_model(
        onnx_info.model_uri, model_config={"max_context": 40, "max_tokens": 2, "threads": 2}
    )
    assert small.predict(SPAIN)["usage"]["completion_tokens"] == 2
    with pytest.raises(MlflowException, match="beyond the context of 40; at most 8 are left"):
        small.predict({**SPAIN, "max_tokens": 9})
    with pytest.raises(ValueError, match="model_config: threads: -1 is too small"):
        mlflow.pyfunc.load_model(onnx_info.model_uri, model_config={"threads": -1})


def test_a_model_with_the_window_of_phi_3_answers_beyond_it(windowed: Path) -> None:
    from tests.fixtures.tiny_checkpoints import exported

    info = log_onnx(exported(windowed), name="windowed", model_config={"threads": 1})
    torch = log_transformers(windowed, name="windowed", dtype="float32")
    wanted = {"messages": [{"role": "user", "content": "abcdefg " * 600}], "max_tokens": 20}
    answers = [mlflow.pyfunc.load_model(i.model_uri).predict(wanted) for i in (info, torch)]
    assert answers[0]["usage"]["prompt_tokens"] > 4096
    assert answers[0]["choices"] == answers[1]["choices"]


def test_a_second_turn_says_what_a_cold_model_says(model: PyFuncModel) -> None:
    """Also after other conversations, other lengths and other sampling have used the cache."""
    python_model = model.unwrap_python_model()
    said = [{"role": "user", "content": "Tell me of the harbour. " * 20}]
    for turn in range(2):
        wanted = {"messages": said, "max_tokens": 5 + turn}
        warm = model.predict(wanted)
        model.predict({**wanted, "temperature": 1.0, "n": 2})
        model.predict({**SPAIN, "max_tokens": 3})
        assert model.predict(wanted)["choices"] == warm["choices"]
        kept = python_model.answerer.prefixes
        kept._kept.clear()
        assert model.predict(wanted)["choices"] == warm["choices"]
        said = [*said, {"role": "assistant", "content": _text(warm)}]
        said.append({"role": "user", "content": f"And then, {turn}?"})


def test_a_second_turn_computes_only_what_is_new(onnx_model: PyFuncModel) -> None:
    answerer = onnx_model.unwrap_python_model().answerer
    said = [{"role": "user", "content": "A long story about the sea. " * 40}]
    first = onnx_model.predict({"messages": said, "max_tokens": 10})
    said += [{"role": "assistant", "content": "short"}, {"role": "user", "content": "Go on"}]
    tokens = answerer.engine.render(said)
    session, reused = answerer.prefixes.take(tokens, 10)
    answerer.prefixes.give_back(session, tokens[:reused])
    history = first["usage"]["prompt_tokens"] - 1  # the tag that asked for the first answer
    # What is left of a turn is a piece of its own only when it is long enough to pay.
    assert history - LEAST_PIECE < reused <= history


def test_memory_of_prefixes_is_bounded(onnx_info: Any) -> None:
    config = {"prefix_cache_mb": 2}
    model = mlflow.pyfunc.load_model(onnx_info.model_uri, model_config=config)
    prefixes = model.unwrap_python_model().answerer.prefixes
    for number in range(8):
        content = f"{number} is the number of this text. " * 25
        model.predict({"messages": [{"role": "user", "content": content}], "max_tokens": 2})
        assert 0 < prefixes.kept_bytes() <= 2 * 1024 * 1024


def test_threads_get_their_own_answers(model: PyFuncModel) -> None:
    asked = [
        {
            "messages": [{"role": "user", "content": f"Number {n}. " * (n + 1)}],
            "max_tokens": 5 + n,
            "temperature": 0.7 * (n % 2),
            "custom_inputs": {"seed": n},
        }
        for n in range(6)
    ]
    alone = [model.predict(dict(wanted))["choices"] for wanted in asked]
    together: dict[int, Any] = {}

    def ask(number: int) -> None:
        for _ in range(3):
            together[number] = model.predict(dict(asked[number]))["choices"]

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [together[n] for n in range(6)] == alone


@pytest.mark.parametrize("flavor", ["onnx", "transformers"])
def test_what_is_logged_names_its_requirements_and_no_path_of_this_machine(
    request: pytest.FixtureRequest, flavor: Any, checkpoint: Path
) -> None:
    folder = _folder(request.getfixturevalue(f"{flavor}_info"))
    assert (folder / "requirements.txt").read_text().splitlines() == requirements(flavor)
    assert all("==" in line and "+" not in line for line in requirements(flavor))
    assert not any("torchvision" in line for line in requirements(flavor))
    mlmodel = yaml.safe_load((folder / "MLmodel").read_text())
    del mlmodel["artifact_path"]  # the store itself
    here = (str(Path(__file__).parents[2]), str(checkpoint.parent))
    for text in (
        [yaml.safe_dump(mlmodel), (folder / "LICENSE.txt").read_text()]
        if (folder / "LICENSE.txt").exists()
        else [yaml.safe_dump(mlmodel)]
    ):
        assert not any(path in text for path in here)
    assert not [file for file in folder.rglob("*") if file.is_symlink() or file.suffix == ".pkl"]
    assert json.loads((folder / "input_example.json").read_text())["messages"]
    assert mlmodel["metadata"]["task"] == "llm/v1/chat"


def test_the_transformers_flavor_is_mlflows_own(transformers_info: Any) -> None:
    import torch

    pipeline = mlflow.transformers.load_model(transformers_info.model_uri)
    assert pipeline.task == "text-generation"
    assert pipeline.model.dtype == torch.float32
    assert transformers_info.flavors["transformers"]["inference_task"] == "llm/v1/chat"
    folder = _folder(transformers_info)
    assert (folder / "model_card.md").read_text().startswith("# Tiny")
    assert (folder / "LICENSE.txt").read_text() == "Do what you like.\n"


def test_an_automatic_dtype_is_the_checkpoints_and_is_written_down(
    tmp_path: Path, checkpoint: Path
) -> None:
    import torch

    half = tmp_path / "half"
    shutil.copytree(checkpoint, half)
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    info = log_transformers(half, name="half", dtype="auto")
    assert info.flavors["transformers"]["torch_dtype"] == "torch.bfloat16"
    model = mlflow.pyfunc.load_model(info.model_uri)
    assert model.unwrap_python_model().answerer.engine._model.dtype == torch.bfloat16
    again = mlflow.pyfunc.load_model(info.model_uri, model_config={"dtype": "float32"})
    assert again.unwrap_python_model().answerer.engine._model.dtype == torch.float32


def test_run_params_and_tags_are_recorded(onnx_dir: Path) -> None:
    with mlflow.start_run() as run:
        info = log_onnx(
            onnx_dir,
            name="tagged",
            metadata={"origin": "here"},
            tags={"flavor": "onnx"},
            params={"precision": "fp32"},
            model_card="# Card\n",
        )
    logged = mlflow.get_logged_model(info.model_id)
    assert (logged.name, logged.source_run_id) == ("tagged", run.info.run_id)
    assert logged.tags["flavor"] == "onnx"
    assert logged.params["precision"] == "fp32"
    assert str(logged.status) == "READY"
    assert info.metadata == {"task": "llm/v1/chat", "origin": "here"}
    assert (_folder(info) / "model_card.md").read_text() == "# Card\n"
    assert mlflow.get_run(run.info.run_id).data.params == {}


@pytest.mark.slow
def test_logging_onnx_writes_the_model_once(onnx_dir: Path, tmp_path: Path) -> None:
    """Counted by the system for a process of its own, with a model that outweighs all else."""
    padded = tmp_path / "onnx"
    padded.mkdir()
    for file in onnx_dir.iterdir():
        (padded / file.name).symlink_to(file)
    size = 40_000_000
    (padded / "padding.bin").write_bytes(os.urandom(size))
    script = (
        "import pathlib, sys; from phi3_mlflow.flavors.onnx import log_onnx\n"
        "def written():\n"
        "    text = pathlib.Path('/proc/self/io').read_text()\n"
        "    return int(dict(l.split(': ') for l in text.splitlines())['wchar'])\n"
        "import mlflow; mlflow.set_experiment('x'); before = written()\n"
        "info = log_onnx(pathlib.Path(sys.argv[1]), name='padded')\n"
        "print(written() - before, info.model_uri)\n"
    )
    if not Path("/proc/self/io").exists():
        pytest.skip("this system does not count the bytes of a process")
    done = subprocess.run(
        [sys.executable, "-c", script, str(padded)],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    wchar, _ = done.stdout.split()[-2:]
    stored = list((tmp_path / "mlruns").rglob("padding.bin"))
    assert [file.stat().st_size for file in stored] == [size]
    # A copy within the kernel is not counted as written by the process: at most one is.
    assert int(wchar) < 1.1 * size


@pytest.mark.parametrize("flavor", ["onnx", "transformers"])
def test_a_file_that_is_gone_or_cut_off_is_named_by_whoever_loads(
    flavor: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    info = request.getfixturevalue(f"{flavor}_info")
    copy = tmp_path / "model"
    shutil.copytree(mlflow.artifacts.download_artifacts(info.model_uri), copy)
    mlflow.pyfunc.load_model(str(copy))
    weights = max((path for path in copy.rglob("*") if path.is_file()), key=_bytes_of)
    name = weights.relative_to(copy).as_posix()
    os.truncate(weights, 10)
    with pytest.raises(MlflowException, match=f"{name} has 10 bytes"):
        mlflow.pyfunc.load_model(str(copy))
    weights.unlink()
    with pytest.raises(MlflowException, match=f"{name} is missing"):
        mlflow.pyfunc.load_model(str(copy))


def _bytes_of(file: Path) -> int:
    return file.stat().st_size


def test_a_directory_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no genai_config\.json"):
        log_onnx(tmp_path, name="x")
    with pytest.raises(UserError, match=r"no config\.json"):
        log_transformers(tmp_path, name="x", dtype="float32")


def test_values_that_are_not_known_are_refused(onnx_dir: Path, checkpoint: Path) -> None:
    with pytest.raises(UserError, match="model_config: thread: no such value"):
        log_onnx(onnx_dir, name="x", model_config={"thread": 1})
    with pytest.raises(UserError, match="dtype: 'int8' is not one of float32"):
        log_transformers(checkpoint, name="x", dtype="int8")


def test_batch_is_a_value_of_model_config(onnx_dir: Path) -> None:
    info = log_onnx(onnx_dir, name="tiny", model_config={"threads": 1})
    loaded = mlflow.pyfunc.load_model(info.model_uri, model_config={"batch": 2})
    model = loaded.unwrap_python_model()
    assert type(model.answerer.engine).__name__ == "BatchEngine"
    asked = [{"messages": [{"role": "user", "content": text}], "max_tokens": 5} for text in "abc"]
    answers = loaded.predict(asked)
    assert [answer["usage"]["completion_tokens"] for answer in answers] == [5, 5, 5]
