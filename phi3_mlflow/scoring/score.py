"""Scoring a file: what is done already, the rest, and the file written."""

from __future__ import annotations

import json
import os
import secrets
import time
from contextlib import closing
from dataclasses import asdict, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

from phi3_mlflow.artifacts.manifests import sha256_of_file
from phi3_mlflow.core import console
from phi3_mlflow.core.errors import EnvironmentProblem, UserError
from phi3_mlflow.core.machine import usable_cores
from phi3_mlflow.core.progress import Meter, show_progress
from phi3_mlflow.scoring.files import ScoredFile, open_scored
from phi3_mlflow.scoring.job import ScoringJob, ScoringSummary
from phi3_mlflow.scoring.journal import Journal
from phi3_mlflow.scoring.local import Batch, BatchResults, LocalEngine, fitting_workers
from phi3_mlflow.scoring.model import SEED, ScoredModel, inspect_model
from phi3_mlflow.scoring.requests import Result
from phi3_mlflow.scoring.spark import SparkEngine
from phi3_mlflow.scoring.worker import WorkerSettings
from phi3_mlflow.tracking.stored_files import require_whole, temporary_downloads
from phi3_mlflow.trust.policy import refuse_untrusted

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from pathlib import Path


class Engine(Protocol):
    """What answers batches of rows.

    Attributes:
        models_loaded: how many processes have loaded the model.
    """

    models_loaded: int

    def run(self, batches: Iterator[Batch]) -> Generator[BatchResults, None, None]:
        """Score batches; their results come in the order in which they are ready."""


def score(job: ScoringJob) -> ScoringSummary:
    """Score a file, or go on where a run before this one was stopped.

    The output appears by one rename, with all rows in the input's order, and is the same to the
    last byte however often the work was interrupted and whatever engine did it.

    Raises:
        UserError: the input, the output or the model is refused.
        EnvironmentProblem: the workers, the disk or Spark give out; the journal keeps what is done.
            Or the model's files are damaged.
    """
    source = open_scored(job.input)
    _check_output(job)
    source.check_columns()
    rows = sum(1 for _ in source.requests())
    before = _state(job.input)
    summary = ScoringSummary(rows, sha256_of_file(job.input))
    with temporary_downloads():
        model = inspect_model(job.model_uri)
        header = _header(job, model, summary)
        if job.force:
            job.journal.unlink(missing_ok=True)
        elif done := _finished(job, header):
            return done
        refuse_untrusted(job.model_uri, job.trust, model.path)
        require_whole(model.path, job.model_uri)
        _fill(job, model, source, header, summary, before)
    return summary


def _fill(
    job: ScoringJob,
    model: ScoredModel,
    source: ScoredFile,
    header: dict[str, Any],
    summary: ScoringSummary,
    before: tuple[int, int],
) -> None:
    """Score what the journal does not have, and write the output from it."""
    try:
        with Journal(job.journal, header, summary.rows, _adopted(job)) as journal:
            summary.resumed = journal.done
            if journal.done:
                told = f"{journal.done} of {summary.rows} rows are in {job.journal.name} already"
                console.say(f"  {told}")
            _score_rest(job, model, source, journal, summary)
            if _state(job.input) != before:
                raise UserError(f"{job.input} was changed while it was scored; nothing written")
            _write(job, source, journal, summary)
            journal.remove()
    except OSError as error:
        raise EnvironmentProblem(
            f"{job.output} cannot be written: {error.strerror or error}. What is done is in "
            f"{job.journal.name}; ask for the same again to go on."
        ) from error


def _header(job: ScoringJob, model: ScoredModel, summary: ScoringSummary) -> dict[str, Any]:
    """What the answers depend on; neither the engine nor how the work is cut up is part of it."""
    return {
        "input_sha256": summary.input_sha256,
        "rows": summary.rows,
        "model": model.identity,
        "model_uri": job.model_uri,
        "max_tokens": job.options.get("max_tokens"),
        "temperature": job.options.get("temperature"),
        "top_p": job.options.get("top_p"),
        # Near ties fall otherwise when a row is computed by itself.
        "computed": "together" if job.batch > 1 else "in turns",
        SEED: secrets.randbits(53) if job.seed is None else job.seed,
    }


def _adopted(job: ScoringJob) -> tuple[str, ...]:
    """What a run that goes on takes over from the one before: a seed that nobody gave."""
    return (SEED,) if job.seed is None else ()


def _check_output(job: ScoringJob) -> None:
    if job.output.suffix.lower() != job.input.suffix.lower():
        raise UserError(
            f"{job.output}: should be of the input's format and end in {job.input.suffix}"
        )
    if job.output.is_dir():
        raise UserError(f"{job.output}: is a folder")
    if job.output.exists() and job.output.samefile(job.input):
        raise UserError(f"{job.output}: is the input; name another output")


def _finished(job: ScoringJob, header: dict[str, Any]) -> ScoringSummary | None:
    """What the output of this very job came to, if it is there.

    Raises:
        UserError: there is an output of something else.
    """
    if not job.output.exists() or job.journal.exists():
        return None
    try:
        record = json.loads(job.record.read_text("utf-8"))
        asked, summary = record["order"], ScoringSummary(**record["outcome"])
        free = _adopted(job)
        same = all(asked.get(name) == header[name] for name in header if name not in free)
        if same and sha256_of_file(job.output) == summary.output_sha256:
            return replace(summary, was_there=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(
        f"{job.output} is there already, and is not what this would give. Name another output, "
        "or replace it: -P force=true"
    )


def _score_rest(
    job: ScoringJob,
    model: ScoredModel,
    source: ScoredFile,
    journal: Journal,
    summary: ScoringSummary,
) -> None:
    missing = summary.rows - journal.done
    if not missing:
        return
    unanswerable: BatchResults = []
    engine = _engine(job, model, journal.header[SEED], -(-missing // job.batch_size))
    started = time.monotonic()
    with show_progress("scoring", missing, "rows") as progress:
        batches = _batches(source, journal, model, job.batch_size, unanswerable)
        # Closed here and now, whatever happens: the workers end with it.
        with closing(engine.run(batches)) as results:
            for scored in results:
                journal.append(scored)
                progress.advance(len(scored))
                summary.new_tokens += sum(result.completion_tokens or 0 for _, result in scored)
                _note(journal, unanswerable, progress)
        _note(journal, unanswerable, progress)
    summary.seconds = time.monotonic() - started
    summary.models_loaded = engine.models_loaded


def _note(journal: Journal, results: BatchResults, progress: Meter) -> None:
    if results:
        journal.append(results)
        progress.advance(len(results))
        results.clear()


def _batches(
    source: ScoredFile,
    journal: Journal,
    model: ScoredModel,
    size: int,
    unanswerable: BatchResults,
) -> Iterator[Batch]:
    """The rows that are missing, in batches; those that cannot be asked go to `unanswerable`."""

    def askable() -> Iterator[tuple[int, str]]:
        for request in source.requests():
            if request.index in journal:
                continue
            body, error = model.body(request)
            if error:
                unanswerable.append((request.index, Result(error=error)))
            else:
                yield request.index, json.dumps(body)

    rows = askable()
    while batch := list(islice(rows, size)):
        yield batch


def _engine(job: ScoringJob, model: ScoredModel, seed: int, batches: int) -> Engine:
    workers = job.workers or min(fitting_workers(model.path), batches)
    settings = WorkerSettings(
        model=str(model.path),
        threads=max(1, usable_cores() // workers),
        prompts=model.prompts,
        seeded=model.seeded,
        options=dict(job.options),
        seed=seed,
        batch=job.batch,
    )
    if job.engine == "local":
        return LocalEngine(settings, workers)
    return SparkEngine(settings, job.master or f"local[{workers}]")


def _write(job: ScoringJob, source: ScoredFile, journal: Journal, summary: ScoringSummary) -> None:
    """Write the output, and the record next to it; each appears whole or not at all."""

    def result(index: int) -> Result:
        found = journal.result(index)
        summary.failed += found.error is not None
        summary.prompt_tokens += found.prompt_tokens or 0
        summary.completion_tokens += found.completion_tokens or 0
        return found

    part = job.output.with_name(f".{job.output.name}.part")
    try:
        source.write(part, result)
        summary.output_sha256 = sha256_of_file(part)
        _to_disk(part, job.output)
    finally:
        part.unlink(missing_ok=True)
    record = {"order": journal.header, "outcome": asdict(summary)}
    part.write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    _to_disk(part, job.record)


def _to_disk(part: Path, target: Path) -> None:
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the renaming, too
    finally:
        os.close(folder)


def _state(file: Path) -> tuple[int, int]:
    about = file.stat()
    return about.st_size, about.st_mtime_ns
