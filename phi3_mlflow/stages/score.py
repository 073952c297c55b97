"""Answer every row of a file with a model, and write the same rows with the answers.

    mlflow run . -e score -P input=/data/questions.jsonl -P output=/data/answers.jsonl
    python -m steps.score --input questions.csv --output answers.csv --max-tokens 64
    python -m steps.score --input q.parquet --output a.parquet --engine spark --workers 4

JSONL, CSV or Parquet with a column `prompt` or `messages`; added are response, finish_reason,
prompt_tokens, completion_tokens and error. A row that fails carries its error. A run that is
stopped, however, goes on where it was when the same is asked again. The model is the champion of
the profile unless model_uri names another.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_mlflow.config.parameters import AUTO, Request
from phi3_mlflow.core import console
from phi3_mlflow.core.errors import UserError, problem_list
from phi3_mlflow.scoring.score import Order, Outcome, score
from phi3_mlflow.tracking.runs import StepRun, step_run, summary_line

if TYPE_CHECKING:
    from mlflow.data.dataset import Dataset

PARAMETERS = (
    "profile", "input", "output", "model_uri", "engine", "master", "workers", "batch_size", "batch",
    "max_tokens", "temperature", "top_p", "seed", "force", "quiet",
)  # fmt: skip
CHOICES = {"force": ("true", "false")}
_BATCH_SIZE = 16
_BATCH = 8


def main(request: Request) -> None:
    console.set_quiet(request.flag("quiet"))
    settings = read_settings(request)
    with step_run("score", request, None) as run:
        order = make_order(request, settings)
        console.say(f"score: {order.input} with {order.model_uri}")
        log_order(order)
        outcome = score(order)
        if outcome.was_there:
            console.say("score: nothing to do, the output is there")
        log_outcome(order, outcome)
        print(summary(order, outcome, run), flush=True)


def read_settings(request: Request) -> dict[str, Any]:
    """The parameters as numbers and paths; None where they are left to others.

    Raises:
        UserError: naming each one that is wrong.
    """
    problems: list[str] = []
    settings: dict[str, Any] = {
        "workers": _number(request, "workers", int, 1, 1024, problems),
        "batch_size": _number(request, "batch_size", int, 1, 100_000, problems),
        "batch": _number(request, "batch", int, 1, 64, problems),
        "max_tokens": _number(request, "max_tokens", int, 1, 2**31 - 1, problems),
        "temperature": _number(request, "temperature", float, 0, 2, problems),
        "top_p": _number(request, "top_p", float, 0, 1, problems),
        "seed": _number(request, "seed", int, 0, 2**53, problems),
    }
    for name in ("input", "output"):
        if request.is_auto(name):
            problems.append(f"parameter: {name} has to be given: the path of a file")
        settings[name] = Path(request.value(name)).expanduser().absolute()
    settings["master"] = None
    if not request.is_auto("master"):
        from phi3_mlflow.scoring.spark import check_master

        if request.value("engine") != "spark":
            problems.append("parameter: master is for engine spark only")
        try:
            settings["master"] = check_master(request.value("master"))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError(problem_list("These parameters are wrong", problems))
    return settings


def _number(
    request: Request, name: str, kind: type, low: float, high: float, problems: list[str]
) -> Any:
    text = request.value(name)
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


def make_order(request: Request, settings: dict[str, Any]) -> Order:
    options = {
        name: settings[name]
        for name in ("max_tokens", "temperature", "top_p")
        if settings[name] is not None
    }
    return Order(
        input=settings["input"],
        output=settings["output"],
        model_uri=model_uri(request),
        options=options,
        seed=settings["seed"],
        engine=request.value("engine"),
        master=settings["master"],
        workers=settings["workers"],
        batch_size=settings["batch_size"] or _BATCH_SIZE,
        batch=settings["batch"] or _BATCH,
        force=request.flag("force"),
    )


def model_uri(request: Request) -> str:
    """The model to ask; an alias is replaced by the version that it points to now.

    Raises:
        UserError: there is none.
    """
    from phi3_mlflow.tracking import registry

    name, text = request.profile.registered_model, request.value("model_uri")
    if text == AUTO:
        champion = registry.alias_of(name, registry.CHAMPION)
        if champion is None:
            raise UserError(
                f"parameter: model_uri = 'auto': no version of {name} carries the alias "
                f"{registry.CHAMPION}.\nRun  mlflow run . -P profile={request.profile.name}  "
                "first, or name a model: -P model_uri=models:/NAME/1"
            )
        return f"models:/{name}/{champion}"
    if text.startswith("models:/") and not text.startswith("models:/m-"):
        try:
            return registry.find_version(text, name).uri
        except UserError as error:
            told = str(error).replace("parameter: version", "parameter: model_uri")
            raise UserError(told) from error
    return text


def log_order(order: Order) -> None:
    import mlflow

    values = {
        "input": order.input, "output": order.output, "model_uri": order.model_uri,
        "engine": order.engine, "master": order.master, "workers": order.workers,
        "batch_size": order.batch_size, "batch": order.batch, "seed": order.seed, **order.options,
    }  # fmt: skip
    given = {f"resolved.{k}": str(v) for k, v in values.items() if v is not None}
    mlflow.log_params(given)


def log_outcome(order: Order, outcome: Outcome) -> None:
    """Figures, and both files as datasets by their digests."""
    import mlflow

    mlflow.log_metrics(outcome.metrics())
    mlflow.log_input(_dataset(order.input, outcome.input_sha256), context="scoring")
    mlflow.log_input(_dataset(order.output, outcome.output_sha256), context="scored")
    mlflow.log_artifact(str(order.record), "score")
    mlflow.set_tags({"output_sha256": outcome.output_sha256, "output_path": str(order.output)})


def _dataset(file: Path, digest: str) -> Dataset:
    import warnings

    from mlflow.data.dataset_source_registry import resolve_dataset_source
    from mlflow.data.meta_dataset import MetaDataset

    with warnings.catch_warnings():  # MLflow has two names for a file's source, and says so
        warnings.simplefilter("ignore")
        source = resolve_dataset_source(file.as_uri())
    kind: Any = MetaDataset  # a digest of MLflow's may have 36 characters
    return kind(source, name=file.name, digest=digest[:32])


def summary(order: Order, outcome: Outcome, run: StepRun) -> str:
    return summary_line(
        step="score",
        status="done",
        cached=outcome.was_there,
        rows=outcome.rows,
        failed=outcome.failed,
        resumed=outcome.resumed,
        tokens_per_second=round(outcome.metrics()["tokens_per_second"], 1),
        **run.figures(),
        output=order.output,
        run_id=run.run_id,
    )
