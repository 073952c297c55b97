"""Scoring a file: what was asked for, what is done already, the rest, and the file written."""

from __future__ import annotations

import json
import os
import secrets
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from phi3_mlflow.artifacts.manifests import sha256_of_file
from phi3_mlflow.core import console
from phi3_mlflow.core.errors import EnvironmentProblem, UserError
from phi3_mlflow.core.progress import Meter, show_progress
from phi3_mlflow.scoring.files import RowFile, open_rows
from phi3_mlflow.scoring.journal import Journal
from phi3_mlflow.scoring.local import Batch, LocalEngine, Scored, cores, fitting_workers
from phi3_mlflow.scoring.rows import Result, Row
from phi3_mlflow.scoring.worker import Ask

SEED = "seed"


@dataclass(frozen=True)
class Order:
    """What somebody asked to have scored.

    Attributes:
        input, output: files of the same format.
        model_uri: resolved, of one version; never an alias.
        options: `max_tokens`, `temperature`, `top_p`, as far as they were given.
        seed: None draws one, which a resumed run takes from the journal.
        engine: `local` or `spark`.
        master: of Spark; None: this machine.
        workers: None: as many as fit.
        batch_size: rows that are handed out, and entered in the journal, together.
        batch: rows that a worker computes together, if the model can; 1: as `predict` would.
        force: begin anew whatever is there.
    """

    input: Path
    output: Path
    model_uri: str
    options: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    engine: str = "local"
    master: str | None = None
    workers: int | None = None
    batch_size: int = 16
    batch: int = 8
    force: bool = False

    @property
    def journal(self) -> Path:
        return self.output.with_name(self.output.name + ".journal")

    @property
    def record(self) -> Path:
        return self.output.with_name(self.output.name + ".score.json")


@dataclass
class Outcome:
    """What scoring came to.

    Attributes:
        rows: of the input.
        failed: of these, with an error.
        resumed: of these, found in the journal.
        seconds: of the rows that were scored now.
        prompt_tokens, completion_tokens: of all rows.
        new_tokens: completion tokens of the rows that were scored now.
        models_loaded: worker processes that loaded the model.
        was_there: the output of the same order was there, and nothing was done.
    """

    rows: int
    input_sha256: str
    output_sha256: str = ""
    failed: int = 0
    resumed: int = 0
    seconds: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    new_tokens: int = 0
    models_loaded: int = 0
    was_there: bool = False

    def metrics(self) -> dict[str, float]:
        scored = self.rows - self.resumed
        return {
            "rows": self.rows,
            "failed": self.failed,
            "resumed": self.resumed,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "tokens_per_second": self.new_tokens / self.seconds if self.seconds else 0.0,
            "rows_per_second": scored / self.seconds if self.seconds else 0.0,
            "models_loaded": self.models_loaded,
        }


class Engine(Protocol):
    models_loaded: int

    def run(self, batches: Iterator[Batch]) -> Generator[Scored, None, None]:
        """Score batches; their results come in the order in which they are ready."""


@dataclass(frozen=True)
class Model:
    """What the model's own files say about it."""

    path: Path
    identity: str
    prompts: bool
    seeded: bool


def score(order: Order) -> Outcome:
    """Score a file, or go on where a run before this one was stopped.

    The output appears by one rename, with all rows in the input's order, and is the same to the
    last byte however often the work was interrupted and whatever engine did it.

    Raises:
        UserError: the input, the output or the model is refused.
        EnvironmentProblem: the workers, the disk or Spark give out; the journal keeps what is done.
    """
    source = open_rows(order.input)
    _check_output(order)
    source.check_columns()
    rows = sum(1 for _ in source.rows())
    before = _state(order.input)
    outcome = Outcome(rows, sha256_of_file(order.input))
    with _downloads():
        model = inspect(order.model_uri)
        header = _header(order, model, outcome)
        if order.force:
            order.journal.unlink(missing_ok=True)
        elif _is_done(order, header, outcome):
            return outcome
        _fill(order, model, source, header, outcome, before)
    return outcome


def _fill(
    order: Order,
    model: Model,
    source: RowFile,
    header: dict[str, Any],
    outcome: Outcome,
    before: tuple[int, int],
) -> None:
    """Score what the journal does not have, and write the output from it."""
    try:
        with Journal(order.journal, header, outcome.rows, _adopted(order)) as journal:
            outcome.resumed = journal.done
            if journal.done:
                told = f"{journal.done} of {outcome.rows} rows are in {order.journal.name} already"
                console.say(f"  {told}")
            _score_rest(order, model, source, journal, outcome)
            if _state(order.input) != before:
                raise UserError(f"{order.input} was changed while it was scored; nothing written")
            _write(order, source, journal, outcome)
            journal.remove()
    except OSError as error:
        raise EnvironmentProblem(
            f"{order.output} cannot be written: {error.strerror or error}. What is done is in "
            f"{order.journal.name}; ask for the same again to go on."
        ) from error


@contextmanager
def _downloads() -> Iterator[None]:
    """Let MLflow download into a folder that goes away: it leaves its copies in the system's.

    A model in a store on this machine is not copied, and stays where it is.
    """
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="phi3-mlflow-score-") as folder:
        tempfile.tempdir = folder
        try:
            yield
        finally:
            tempfile.tempdir = before


def inspect(model_uri: str) -> Model:
    """Find a model's files and what it takes.

    Raises:
        UserError: it is not there, or takes neither messages nor a prompt.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        path = Path(mlflow.artifacts.download_artifacts(artifact_uri=model_uri))
        about = mlflow.models.Model.load(str(path))
    except (MlflowException, OSError) as error:
        raise UserError(
            f"parameter: model_uri = {model_uri!r}: no such model: {str(error)[:300]}"
        ) from error
    inputs, parameters = about.get_input_schema(), about.get_params_schema()
    names = inputs.input_names() if inputs is not None and inputs.has_input_names() else []
    if "messages" not in names and names != ["prompt"]:
        raise UserError(
            f"parameter: model_uri = {model_uri!r}: the model takes neither messages nor a prompt, "
            f"but {', '.join(names) or 'what its signature does not say'}"
        )
    seeded = parameters is not None and any(spec.name == SEED for spec in parameters.params)
    return Model(path, str(about.model_uuid), "messages" not in names, seeded)


def _header(order: Order, model: Model, outcome: Outcome) -> dict[str, Any]:
    """What the answers depend on; neither the engine nor how the work is cut up is part of it."""
    return {
        "input_sha256": outcome.input_sha256,
        "rows": outcome.rows,
        "model": model.identity,
        "model_uri": order.model_uri,
        "max_tokens": order.options.get("max_tokens"),
        "temperature": order.options.get("temperature"),
        "top_p": order.options.get("top_p"),
        # Near ties fall otherwise when a row is computed by itself.
        "computed": "together" if order.batch > 1 else "in turns",
        SEED: secrets.randbits(53) if order.seed is None else order.seed,
    }


def _adopted(order: Order) -> tuple[str, ...]:
    """What a run that goes on takes over from the one before: a seed that nobody gave."""
    return (SEED,) if order.seed is None else ()


def _check_output(order: Order) -> None:
    if order.output.suffix.lower() != order.input.suffix.lower():
        raise UserError(
            f"{order.output}: should be of the input's format and end in {order.input.suffix}"
        )
    if order.output.is_dir():
        raise UserError(f"{order.output}: is a folder")
    if order.output.exists() and order.output.samefile(order.input):
        raise UserError(f"{order.output}: is the input; name another output")


def _is_done(order: Order, header: dict[str, Any], outcome: Outcome) -> bool:
    """Whether the output of this very order is there; fills the outcome if it is.

    Raises:
        UserError: there is an output of something else.
    """
    if not order.output.exists() or order.journal.exists():
        return False
    try:
        record = json.loads(order.record.read_text("utf-8"))
        asked, figures = record["order"], record["outcome"]
        free = _adopted(order)
        same = all(asked.get(name) == header[name] for name in header if name not in free)
        whole = sha256_of_file(order.output) == figures["output_sha256"]
        if same and whole:
            for name, value in figures.items():
                setattr(outcome, name, value)
            outcome.was_there = True
            return True
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(
        f"{order.output} is there already, and is not what this would give. Name another output, "
        "or replace it: -P force=true"
    )


def _score_rest(
    order: Order, model: Model, source: RowFile, journal: Journal, outcome: Outcome
) -> None:
    missing = outcome.rows - journal.done
    if not missing:
        return
    unanswerable: list[tuple[int, Result]] = []
    engine = _engine(order, model, journal.header[SEED], -(-missing // order.batch_size))
    started = time.monotonic()
    with show_progress("scoring", missing, "rows") as progress:
        batches = _batches(source, journal, model, order.batch_size, unanswerable)
        # Closed here and now, whatever happens: the workers end with it.
        with closing(engine.run(batches)) as results:
            for scored in results:
                journal.append(scored)
                progress.advance(len(scored))
                outcome.new_tokens += sum(result.completion_tokens or 0 for _, result in scored)
                _note(journal, unanswerable, progress)
        _note(journal, unanswerable, progress)
    outcome.seconds = time.monotonic() - started
    outcome.models_loaded = engine.models_loaded


def _note(journal: Journal, results: Scored, progress: Meter) -> None:
    if results:
        journal.append(results)
        progress.advance(len(results))
        results.clear()


def _batches(
    source: RowFile,
    journal: Journal,
    model: Model,
    size: int,
    unanswerable: list[tuple[int, Result]],
) -> Iterator[Batch]:
    """The rows that are missing, in batches; those that cannot be asked go to `unanswerable`."""

    def askable() -> Iterator[tuple[int, str]]:
        for row in source.rows():
            if row.index in journal:
                continue
            request, error = _for_contract(row, model)
            if error:
                unanswerable.append((row.index, Result(error=error)))
            else:
                yield row.index, json.dumps(request)

    rows = askable()
    while batch := list(islice(rows, size)):
        yield batch


def _for_contract(row: Row, model: Model) -> tuple[dict[str, Any], str | None]:
    """A row's request as the model takes it."""
    if row.request is None:
        return {}, row.error
    if model.prompts:
        if "prompt" not in row.request:
            return {}, "messages: this model takes a prompt (it was logged with contract prompt)"
        return row.request, None
    if "prompt" in row.request:
        return {"messages": [{"role": "user", "content": row.request["prompt"]}]}, None
    return row.request, None


def _engine(order: Order, model: Model, seed: int, batches: int) -> Engine:
    workers = order.workers or min(fitting_workers(model.path), batches)
    ask = Ask(
        model=str(model.path),
        threads=max(1, cores() // workers),
        prompts=model.prompts,
        seeded=model.seeded,
        options=order.options,
        seed=seed,
        batch=order.batch,
    )
    if order.engine == "local":
        return LocalEngine(ask, workers)
    from phi3_mlflow.scoring.spark import SparkEngine

    return SparkEngine(ask, order.master or f"local[{workers}]")


def _write(order: Order, source: RowFile, journal: Journal, outcome: Outcome) -> None:
    """Write the output and the record beside it; each appears whole or not at all."""

    def result(index: int) -> Result:
        found = journal.result(index)
        outcome.failed += found.error is not None
        outcome.prompt_tokens += found.prompt_tokens or 0
        outcome.completion_tokens += found.completion_tokens or 0
        return found

    part = order.output.with_name(f".{order.output.name}.part")
    try:
        source.write(part, result)
        outcome.output_sha256 = sha256_of_file(part)
        _to_disk(part, order.output)
    finally:
        part.unlink(missing_ok=True)
    record = {"order": journal.header, "outcome": asdict(outcome)}
    part.write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    _to_disk(part, order.record)


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
