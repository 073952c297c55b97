"""Answer every row of a file with a model, and write the same rows with the answers.

    mlflow run . --env-manager local -e score -P input=/data/in.jsonl -P output=/data/out.jsonl
    python -m steps.score --input questions.csv --output answers.csv --max-tokens 64
    python -m steps.score --input q.parquet --output a.parquet --engine spark --workers 4

JSONL, CSV or Parquet with a column `prompt` or `messages`; added are response, finish_reason,
prompt_tokens, completion_tokens and error. A row that fails carries its error; with more of them
than max_failed it ends with code 3, the output written. A run that is
stopped, however, goes on where it was when the same is asked again. The model is the champion of
the profile unless model_uri names another.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from phi3_mlflow.config.parameters import AUTO, Request
from phi3_mlflow.core import console
from phi3_mlflow.core.console import summary_line
from phi3_mlflow.core.errors import TooManyFailed, UserError, problem_list
from phi3_mlflow.pipeline.command import Command
from phi3_mlflow.scoring.job import ScoringJob, ScoringSummary
from phi3_mlflow.scoring.score import score
from phi3_mlflow.stages.asked_model import model_uri
from phi3_mlflow.tracking.runs import StepRun, step_run

if TYPE_CHECKING:
    from mlflow.data.dataset import Dataset

_BATCH_SIZE = 16
_BATCH = 8

N = TypeVar("N", int, float)


class Score(Command):
    """Answering the rows of a file."""

    name = "score"
    parameters = (
        "profile", "input", "output", "model_uri", "max_failed", "engine", "master", "workers",
        "batch_size",
        "batch", "max_tokens", "temperature", "top_p", "seed", "force", "quiet",
    )  # fmt: skip
    choices = {"force": ("true", "false")}  # noqa: RUF012 (as in Command)

    def run(self, request: Request) -> None:
        job, bound = read_job(request), max_failed(request)
        with step_run("score", request.profile.name) as run:
            job = replace(job, model_uri=model_uri(request), trust=request.profile.trust)
            console.say(f"score: {job.input} with {job.model_uri}")
            run.log_settings(asked_for(job), {})
            done = score(job)
            if done.was_there:
                console.say("score: nothing to do, the output is there")
            log_summary(job, done)
            if bound is not None and done.failed > (allowed := bound.of(done.rows)):
                raise TooManyFailed(
                    f"{done.failed} of {done.rows} rows failed; max_failed = {bound.text} allows "
                    f"{allowed}. The answers, and why these rows have none, are in {job.output}"
                )
            print(summary(job, done, run), flush=True)


@dataclass(frozen=True)
class Bound:
    """How many rows may fail.

    Attributes:
        text: as it was given.
        count: rows, or None where it is a part of them.
        part: of all rows, 0 to 1.
    """

    text: str
    count: int | None
    part: float = 0.0

    def of(self, rows: int) -> int:
        """Rows that may fail of so many."""
        return int(rows * self.part) if self.count is None else self.count


def max_failed(request: Request) -> Bound | None:
    """The bound on failed rows; None for none.

    Raises:
        UserError: it is neither a number nor a percentage.
    """
    text = request.value("max_failed").strip()
    if text == AUTO:
        return None
    if re.fullmatch(r"[0-9]{1,9}", text):
        return Bound(text, int(text))
    found = re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]{1,6})?)%", text)
    if found is None or float(found[1]) > 100:
        raise UserError(
            f"parameter: max_failed = {text!r}: expected a number of rows, or a part of them as 5%"
        )
    return Bound(text, None, float(found[1]) / 100)


def read_job(request: Request) -> ScoringJob:
    """What the parameters ask for; the model is still to be looked up.

    Raises:
        UserError: naming each parameter that is wrong.
    """
    problems: list[str] = []

    def number(name: str, kind: type[N], low: float, high: float) -> N | None:
        return _number(request, name, kind, (low, high), problems)

    files = {}
    for name in ("input", "output"):
        if request.is_auto(name):
            problems.append(f"parameter: {name} has to be given: the path of a file")
        files[name] = Path(request.value(name)).expanduser().absolute()
    sampling = {
        "max_tokens": number("max_tokens", int, 1, 2**31 - 1),
        "temperature": number("temperature", float, 0, 2),
        "top_p": number("top_p", float, 0, 1),
    }
    job = ScoringJob(
        input=files["input"],
        output=files["output"],
        model_uri=request.value("model_uri"),
        options={name: value for name, value in sampling.items() if value is not None},
        seed=number("seed", int, 0, 2**53),
        engine=request.value("engine"),
        master=_master(request, problems),
        workers=number("workers", int, 1, 1024),
        batch_size=number("batch_size", int, 1, 100_000) or _BATCH_SIZE,
        batch=number("batch", int, 1, 64) or _BATCH,
        force=request.flag("force"),
    )
    if problems:
        raise UserError(problem_list("These parameters are wrong", problems))
    return job


def _number(
    request: Request, name: str, kind: type[N], bounds: tuple[float, float], problems: list[str]
) -> N | None:
    text, (low, high) = request.value(name), bounds
    if text == AUTO:
        return None
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not low <= value <= high:
        what = "a whole number" if kind is int else "a number"
        problems.append(f"parameter: {name} = {text!r}: expected {what} from {low:g} to {high:g}")
        return None
    return value


def _master(request: Request, problems: list[str]) -> str | None:
    if request.is_auto("master"):
        return None
    from phi3_mlflow.scoring.spark import check_master

    if request.value("engine") != "spark":
        problems.append("parameter: master is for engine spark only")
    try:
        return check_master(request.value("master"))
    except UserError as error:
        problems.append(str(error))
        return None


def asked_for(job: ScoringJob) -> dict[str, Any]:
    """What was asked for, as the run shows it."""
    return {
        "input": job.input, "output": job.output, "model_uri": job.model_uri,
        "engine": job.engine, "master": job.master, "workers": job.workers,
        "batch_size": job.batch_size, "batch": job.batch, "seed": job.seed, **job.options,
    }  # fmt: skip


def log_summary(job: ScoringJob, done: ScoringSummary) -> None:
    """Log the metrics, and both files as datasets by their digests."""
    import mlflow

    mlflow.log_metrics(done.metrics())
    mlflow.log_input(_dataset(job.input, done.input_sha256), context="scoring")
    mlflow.log_input(_dataset(job.output, done.output_sha256), context="scored")
    mlflow.log_artifact(str(job.record), "score")
    mlflow.set_tags({"output_sha256": done.output_sha256, "output_path": str(job.output)})


def _dataset(file: Path, digest: str) -> Dataset:
    import warnings

    from mlflow.data.dataset_source_registry import resolve_dataset_source
    from mlflow.data.meta_dataset import MetaDataset

    with warnings.catch_warnings():  # MLflow has two names for a file's source, and says so
        warnings.simplefilter("ignore")
        source = resolve_dataset_source(file.as_uri())
    kind: Any = MetaDataset  # a digest of MLflow's may have 36 characters
    dataset: Dataset = kind(source, name=file.name, digest=digest[:32])
    return dataset


def summary(job: ScoringJob, done: ScoringSummary, run: StepRun) -> str:
    """The summary line."""
    return summary_line(
        step="score",
        status="done",
        cached=done.was_there,
        rows=done.rows,
        failed=done.failed,
        resumed=done.resumed,
        tokens_per_second=round(done.metrics()["tokens_per_second"], 1),
        **run.figures(),
        output=job.output,
        run_id=run.run_id,
    )


COMMAND = Score()
