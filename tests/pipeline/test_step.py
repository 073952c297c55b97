"""How a step is carried out: once, again when something is missing or forced, and never unseen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from phi3_mlflow.artifacts.cache import Entry, StepCache
from phi3_mlflow.artifacts.inputs import Folder
from phi3_mlflow.artifacts.records import Record
from phi3_mlflow.config.parameters import Request, read_request
from phi3_mlflow.core import console
from phi3_mlflow.core.errors import UserError
from phi3_mlflow.pipeline.dry_run import foretell
from phi3_mlflow.pipeline.inputs import folder_input
from phi3_mlflow.pipeline.runner import for_step
from phi3_mlflow.pipeline.sequence import Done, Part, follow, needed
from phi3_mlflow.pipeline.step import (
    NoInputs,
    Outcome,
    Settings,
    Step,
    Work,
    carry_out,
    step_parameters,
)
from phi3_mlflow.tracking import registry
from tests.conftest import Workspace


class Note(Record):
    """What the made-up steps leave."""

    text: str


class Write(Step[NoInputs, Note]):
    """A step that writes down how often it was done."""

    name = "write"
    doing = "writing"
    parameters = step_parameters()
    record_type = Note
    done: ClassVar[int] = 0
    gone: ClassVar[str | None] = None

    def inputs(self, request: Request, cache: StepCache) -> NoInputs:
        return NoInputs()

    def settings(self, request: Request) -> Settings:
        return {"profile": request.profile.name}

    def work(self, work: Work[NoInputs]) -> None:
        type(self).done += 1
        work.metrics["times"] = self.done
        Note(text=f"number {self.done}").write(work.out)

    def missing(self, entry: Entry) -> str | None:
        return self.gone


class Again(Write):
    """The same, never cached."""

    name = "again"
    cached = False


class There(Write):
    """The same, with its output in MLflow."""

    name = "there"
    in_mlflow = True


@dataclass(frozen=True)
class ReadInputs:
    """What `Write` left."""

    checkpoint: Folder


class Read(Step[ReadInputs, Note]):
    """A step that takes what `Write` left."""

    name = "read"
    doing = "reading"
    parameters = step_parameters("checkpoint")
    record_type = Note

    def inputs(self, request: Request, cache: StepCache) -> ReadInputs:
        return ReadInputs(folder_input(request, cache, "checkpoint", "write", "a note"))

    def settings(self, request: Request) -> Settings:
        return {}

    def work(self, work: Work[ReadInputs]) -> None:
        Note(text=f"read {Note.read(work.inputs.checkpoint.value).text}").write(work.out)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    console.set_quiet(False)
    monkeypatch.setattr(Write, "done", 0)
    monkeypatch.setattr(Write, "gone", None)


def asked(step: Step[object, Record], **values: str) -> Request:
    return read_request(step.parameters, values)


def test_a_step_is_done_once_and_its_record_is_typed(workspace: Workspace) -> None:
    step = Write()
    first, second = (carry_out(step, asked(step)) for _ in range(2))
    assert (first.hit, second.hit, Write.done) == (False, True, 1)
    assert first.record == second.record == Note(text="number 1")
    client = registry.client()
    runs = client.search_runs([client.get_experiment_by_name("phi3-mlflow").experiment_id])
    assert [run.data.metrics["times"] for run in runs] == [1.0, 1.0]
    assert [run.data.tags.get("cached") for run in runs] == ["true", None]


def test_force_does_it_again(workspace: Workspace) -> None:
    step = Write()
    carry_out(step, asked(step))
    assert carry_out(step, asked(step, force="true")).record.text == "number 2"
    assert carry_out(step, asked(step)).record.text == "number 2"


def test_what_is_missing_is_made_again_and_said(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Write()
    carry_out(step, asked(step))
    monkeypatch.setattr(Write, "gone", "the model m-1 is no longer in MLflow")
    assert not carry_out(step, asked(step)).hit
    assert "write: the model m-1 is no longer in MLflow; doing it again" in capsys.readouterr().err


def test_a_step_that_is_never_cached_is_done_each_time(workspace: Workspace) -> None:
    step = Again()
    assert [carry_out(step, asked(step)).hit for _ in range(2)] == [False, False]


def test_an_output_in_mlflow_is_remembered_per_store(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, write = There().slot, Write().slot
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking.example.com")
    assert There().slot != here
    assert Write().slot == write == "write"


def test_what_a_step_takes_is_what_the_one_before_left(workspace: Workspace) -> None:
    with pytest.raises(UserError, match="step write has left nothing for profile smollm2-135m"):
        carry_out(Read(), asked(Read()))
    carry_out(Write(), asked(Write()))
    assert carry_out(Read(), asked(Read())).record.text == "read number 1"


def test_a_result_of_the_wrong_kind_is_a_fault_of_the_sequence(workspace: Workspace) -> None:
    request = Request(asked(Read()).profile, {}, {"checkpoint": "text"})
    with pytest.raises(TypeError, match="checkpoint: expected Path, found str"):
        carry_out(Read(), request)


PARTS = (
    Part(Write(), lambda done: {}),
    Part(There(), lambda done: {}, when=lambda profile: profile.flavor == "transformers"),
    Part(Read(), lambda done: {"checkpoint": done.folder(Write())}),
)


class InProcess:
    """Follows a sequence in this process."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.names: list[str] = []

    @property
    def profile(self):
        return self.request.profile

    def go_on_with(self, profile) -> None:
        assert profile == self.profile

    def run(self, step, **results: object) -> Outcome:
        self.names.append(step.name)
        return carry_out(step, for_step(self.request, step, results))


def test_a_run_and_its_dry_run_follow_one_list(workspace: Workspace) -> None:
    request = Request(asked(Write()).profile, {})
    assert [step.name for step in needed(PARTS, request.profile)] == ["write", "read"]
    before = foretell(PARTS, request)
    assert [(forecast.step, forecast.reason) for forecast in before] == [
        ("write", "it has not been done for this profile yet"),
        ("read", "its input would be new"),
    ]
    follower = InProcess(request)
    done = follow(PARTS, follower)
    assert follower.names == ["write", "read"]
    assert done.record(PARTS[2].step) == Note(text="read number 1")
    assert [forecast.reason for forecast in foretell(PARTS, request)] == [None, None]
    forced = Request(request.profile, {"force": "read"})
    assert [forecast.reason for forecast in foretell(PARTS, forced)] == [None, "forced"]


def test_the_folder_of_the_first_step_that_was_done_is_taken(tmp_path: Path) -> None:
    done = Done()
    with pytest.raises(LookupError, match="none of write was done"):
        done.folder(Write())
    assert Write() not in done
