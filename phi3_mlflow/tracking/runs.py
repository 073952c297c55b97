"""The MLflow run of a step: opened, filled and closed alike for every step."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_mlflow.artifacts.cache import cache_root
from phi3_mlflow.core import console
from phi3_mlflow.core.console import summary_line
from phi3_mlflow.core.errors import EXIT_DONE, EXIT_FAULT, ProjectError, outcome_of
from phi3_mlflow.core.git import origin
from phi3_mlflow.core.meter import ResourceMeter
from phi3_mlflow.core.shipped import project_path
from phi3_mlflow.tracking.connection import EXPERIMENT_NAME, connect
from phi3_mlflow.tracking.dead_runs import close_dead_runs, owner_tags
from phi3_mlflow.tracking.logged_sets import DIGEST_LENGTH, LoggedSet, log_sets
from phi3_mlflow.tracking.row_sources import source_of

if TYPE_CHECKING:
    import mlflow
    from matplotlib.figure import Figure

    from phi3_mlflow.artifacts.cache import Entry
    from phi3_mlflow.artifacts.inputs import Input


_DRAWN_NAME = re.compile(r"[a-z]+-[a-z]+-\d+")
"""A name that MLflow gives to a run that nobody named: bold-fox-123."""
_ADDRESSES = ("sqlite:///", "file://", "file:")
"""What may stand before the path of a file."""
_DEFAULT_EXPERIMENT = "0"
_PARAM_LIMIT = 6000  # MLflow refuses longer parameter values
_PARAMS_AT_ONCE = 100  # and more in one request


class StepRun:
    """A step's MLflow run while the step is at work."""

    def __init__(self, run: mlflow.ActiveRun, tracking_uri: str, *, child: bool = False) -> None:
        self.run_id: str = run.info.run_id
        self.experiment_id: str = run.info.experiment_id
        self.tracking_uri = tracking_uri
        self._child = child
        self._meter = ResourceMeter()

    def log_settings(self, settings: Mapping[str, Any], inputs: Mapping[str, Input[Any]]) -> None:
        """Log what decides the output: typed settings and inputs.

        They are named `resolved.NAME`, because `mlflow run` has already logged the parameters as
        they were given, and a logged parameter cannot change.
        """
        import mlflow

        values = {f"resolved.{name}": value for name, value in flatten(settings).items()}
        for name, given in inputs.items():
            values[f"resolved.{name}"] = given.shown
            values[f"resolved.{name}.sha256"] = given.digest
        named = [
            (name, setting_text(value)[:_PARAM_LIMIT])
            for name, value in values.items()
            if value not in (None, "")
        ]
        for start in range(0, len(named), _PARAMS_AT_ONCE):
            mlflow.log_params(dict(named[start : start + _PARAMS_AT_ONCE]))

    def point_to(self, entry: Entry) -> None:
        """Mark this run as one that found its output made by an earlier run."""
        import mlflow

        mlflow.set_tags({"cached": "true", "cached_from_run": entry.origin.get("run_id", "")})

    def figures(self) -> dict[str, float]:
        """Seconds and peak memory so far, for a summary line."""
        figures = self._meter.figures()
        return {
            "seconds": round(figures["wall_time_s"], 1),
            "peak_rss_mb": round(figures["peak_rss_bytes"] / 1e6),
        }

    def cost(self) -> dict[str, float]:
        """What the step has cost so far, as `ResourceMeter.figures` has it."""
        return self._meter.figures()

    def log_headline(self, metrics: Mapping[str, float]) -> None:
        """Log figures to this run, and to this run only."""
        _log_metrics(self.run_id, metrics)

    def log_evaluation(self, folder: Path, sets: Sequence[LoggedSet]) -> None:
        """Log what an evaluation left, and the sets it was made on."""
        import mlflow

        log_sets(sets)
        mlflow.log_artifacts(str(folder), "evaluation")

    def log_rows(self, context: str, rows: Input[Path], count: int) -> None:
        """Log a file of rows as an input of the run, by the digest of its content.

        Args:
            context: what they are for: `train` or `validation`.
            rows: the file.
            count: how many rows of it are used.
        """
        import mlflow
        from mlflow.data.meta_dataset import MetaDataset

        source = source_of(rows.shown, rows.value)
        # MLflow's digests have at most 36 characters; the whole is among the run's parameters.
        digest = rows.digest[:DIGEST_LENGTH]
        dataset = MetaDataset(source, name=rows.value.stem, digest=digest)  # type: ignore[abstract]
        mlflow.log_input(dataset, context, {"rows": str(count), "sha256": rows.digest})

    def link_models(self, model_ids: Sequence[str], versions: Sequence[str]) -> None:
        """Show logged models, and the versions that they became, with this run."""
        import mlflow
        from mlflow import MlflowClient
        from mlflow.entities import LoggedModelOutput

        outputs = [LoggedModelOutput(model_id=model_id, step=0) for model_id in model_ids]
        MlflowClient().log_outputs(self.run_id, outputs)
        mlflow.set_tag("model_versions", " ".join(versions))

    def log_point(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values of one step of a curve."""
        import mlflow

        mlflow.log_metrics(dict(values), step=step)

    def log_training(self, adapter: Path, report: Path) -> None:
        """Log an adapter, and the report on how it was trained."""
        import mlflow

        mlflow.log_artifacts(str(adapter), "adapter")
        mlflow.log_artifact(str(report))

    def rename(self, name: str) -> None:
        """Show this run under another name than its step's."""
        import mlflow

        mlflow.set_tag("mlflow.runName", name)

    def log_search(self, rows: Sequence[Mapping[str, Any]], plot: Figure) -> None:
        """Log the candidates of a search: a table of them, and their plot."""
        import mlflow
        import pandas

        mlflow.log_table(pandas.DataFrame(list(rows)), "search/candidates.json")
        mlflow.log_figure(plot, "search/pareto.png")

    def finish(
        self, step: str, entry: Entry, was_there: bool, said: Mapping[str, str] | None = None
    ) -> None:
        """Log figures and the output's manifest, and print the summary line.

        Args:
            step: which one it was.
            entry: its output.
            was_there: an earlier run made it.
            said: what else the summary line says.
        """
        import mlflow

        figures = self._meter.figures()
        metrics = {**entry.origin.get("metrics", {}), **figures}
        _log_metrics(self.run_id, metrics)
        mlflow.log_dict(json.loads(entry.manifest.to_json()), f"manifest/{step}.json")
        mlflow.set_tags({"output_sha256": entry.manifest.digest, "output_path": str(entry.path)})
        if self._child and console.is_quiet():  # main's own line is the one of a quiet run
            return
        print(
            summary_line(
                step=step,
                status="done",
                cached=was_there,
                seconds=round(figures["wall_time_s"], 1),
                peak_rss_mb=round(figures["peak_rss_bytes"] / 1e6),
                output_mb=round(entry.manifest.total_bytes / 1e6, 1),
                output=entry.path,
                run_id=self.run_id,
                **(said or {}),
            ),
            flush=True,
        )


@contextmanager
def step_run(
    step: str, profile: str, parent_run_id: str | None = None, name: str | None = None
) -> Iterator[StepRun]:
    """Open the run of a step: the one `mlflow run` made, a child of `main`'s, or a new one.

    A step that fails leaves its run FAILED with the message as the tag `error`; one that is
    stopped leaves it KILLED. The tags `outcome` and `exit_code` say how it ended.

    Args:
        step: which one.
        profile: its name.
        parent_run_id: the run of `main`, if that runs the step.
        name: of the run; default: the step's and the profile's.
    """
    import mlflow

    with _open_run(step, name or f"{step} {profile}", parent_run_id) as run, _marked():
        close_dead_runs(run.info.experiment_id, run.info.run_id)
        mlflow.set_tags(
            {
                "step": step,
                "profile": profile,
                "git_commit": origin().commit,
                **owner_tags(),
            }
        )
        try:
            yield StepRun(run, mlflow.get_tracking_uri(), child=parent_run_id is not None)
        except ProjectError as error:
            mlflow.set_tag("error", str(error)[:_PARAM_LIMIT])
            raise


@contextmanager
def child_run(name: str, tags: Mapping[str, str]) -> Iterator[str]:
    """A run below the active one, for a part of its work; gives its id.

    Like a step's, it is closed as KILLED later when the process dies.
    """
    import mlflow

    own = {**tags, **owner_tags()}
    with mlflow.start_run(run_name=name, nested=True, tags=own) as run, _marked():
        yield run.info.run_id


@contextmanager
def _marked() -> Iterator[None]:
    """Tag the active run with how what is done inside ends."""
    code: object = EXIT_FAULT
    try:
        yield
        code = EXIT_DONE
    except ProjectError as error:
        code = error.exit_code
        raise
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
        raise
    except SystemExit as stopped:
        code = stopped.code
        raise
    finally:
        _mark(code)


def _mark(code: object) -> None:
    """A store that is gone by now is no reason to hide why."""
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        mlflow.set_tags({"outcome": outcome_of(code), "exit_code": str(code)})
    except MlflowException as error:
        console.say(f"  the outcome of the run could not be written: {error}")


def open_child(name: str) -> str:
    """Make a run below the active one for a process that is about to start; gives its id."""
    import mlflow
    from mlflow import MlflowClient

    parent = mlflow.active_run()
    if parent is None:
        raise RuntimeError("there is no active run to be the parent")
    tags = {"mlflow.parentRunId": parent.info.run_id, "mlflow.runName": name, **owner_tags()}
    client = MlflowClient()
    return str(client.create_run(parent.info.experiment_id, tags=tags, run_name=name).info.run_id)


def close_child(run_id: str, status: str) -> None:
    """Close a run of `open_child`'s as FAILED or KILLED, unless its process has closed it."""
    from mlflow import MlflowClient

    client = MlflowClient()
    if client.get_run(run_id).info.status == "RUNNING":
        client.set_terminated(run_id, status)


@contextmanager
def _open_run(step: str, name: str, parent_run_id: str | None) -> Iterator[mlflow.ActiveRun]:
    import mlflow
    from mlflow.entities import RunStatus

    connect()
    watched = _watches_the_machine(step)
    if parent_run_id:
        parent = mlflow.get_run(parent_run_id)
        run = mlflow.start_run(
            experiment_id=parent.info.experiment_id,
            run_name=name,
            parent_run_id=parent_run_id,
            nested=True,
            log_system_metrics=watched,
        )
    else:
        opened = os.environ.get("MLFLOW_RUN_ID")  # which MLflow takes out of the environment
        run = mlflow.start_run(
            run_name=None if opened else name,
            log_system_metrics=watched,
        )
        if opened and run.info.experiment_id == _DEFAULT_EXPERIMENT:
            console.say(
                "This run is in MLflow's experiment Default, where `mlflow run` opened it; with "
                f"--experiment-name {EXPERIMENT_NAME} it is beside those that are started otherwise"
            )
        if _DRAWN_NAME.fullmatch(run.info.run_name or ""):  # by `mlflow run`, for want of another
            mlflow.set_tag("mlflow.runName", name)
    status = RunStatus.FINISHED
    try:
        yield run
    except (KeyboardInterrupt, SystemExit):
        status = RunStatus.KILLED
        raise
    except BaseException:
        status = RunStatus.FAILED
        raise
    finally:
        mlflow.end_run(RunStatus.to_string(status))


def _watches_the_machine(step: str) -> bool | None:
    """Whether MLflow logs processor, memory, disk and network of a step; None as the user says.

    The runs below that of `main` have them.
    """
    from mlflow.environment_variables import MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING

    # It says at the beginning and the end of every run that it begins and ends.
    logging.getLogger("mlflow.system_metrics.system_metrics_monitor").setLevel(logging.WARNING)
    return None if MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.is_set() else step != "main"


def _log_metrics(run_id: str, metrics: Mapping[str, float]) -> None:
    """Log figures to a run, and not to the models that it has logged.

    MLflow's own call gives a model all that its run is given, and a page of models then begins with
    how long it took to log them.
    """
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    found = [Metric(name, float(value), now, 0) for name, value in metrics.items()]
    MlflowClient().log_batch(run_id, metrics=found)


def artifact_link(run_id: str, path: str) -> str:
    """An artifact of a run in Markdown, as a link within MLflow's pages."""
    import mlflow

    experiment = mlflow.get_run(run_id).info.experiment_id
    return f"[{path}](#/experiments/{experiment}/runs/{run_id}/artifacts/{path}) of run `{run_id}`"


def setting_text(value: object) -> str:
    """A setting as a run shows it, without the folders of this machine."""
    if isinstance(value, list | tuple):
        return str([without_folders(one) if isinstance(one, str) else one for one in value])
    return without_folders(str(value))


def without_folders(value: str) -> str:
    """A value without the folders of this machine, which mean nothing on another.

    Files of the project and of the step cache keep their place in it.
    """
    head = next((head for head in _ADDRESSES if value.startswith(f"{head}/")), "")
    path = Path(value.removeprefix(head))
    if not path.is_absolute() or "\n" in value:
        return value
    if path.is_relative_to(cache_root()):
        return f"cache:{path.relative_to(cache_root())}"
    return head + (project_path(path) or f"…/{path.name}")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat
