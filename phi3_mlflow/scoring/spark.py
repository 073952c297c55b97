"""The Spark engine: every batch is a job of one task, answered through `mapInPandas`.

Jobs are given to Spark as long as it has room, so that its scheduler spreads them over the
executors and each result reaches the journal when it is there. Spark keeps its Python worker
processes between tasks (`spark.python.worker.reuse`), and each holds one loaded model.
"""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
import tempfile
import zipfile
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_mlflow.core.errors import EnvironmentProblem, UserError
from phi3_mlflow.core.machine import usable_cores
from phi3_mlflow.scoring.requests import COLUMNS, Result
from phi3_mlflow.scoring.worker import WorkerSettings, answer_batch

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from phi3_mlflow.scoring.local import Batch, BatchResults

_PACKAGE = Path(__file__).resolve().parents[1]
_SCHEMA = (
    "index long, response string, finish_reason string, prompt_tokens long, "
    "completion_tokens long, error string, fresh boolean"
)
_ARCHIVE = "scored_model"
_QUEUED = 2  # jobs for each core: one at work, one ready to follow


class SparkEngine:
    """Answers batches on Apache Spark.

    Args:
        settings: which model, and how it is asked; its threads are replaced by what a Spark task
            may use.
        master: `local[N]`, `spark://HOST:PORT` or what else Spark takes.

    Raises:
        EnvironmentProblem: pyspark or Java is missing, or the master does not answer.
    """

    def __init__(self, settings: WorkerSettings, master: str) -> None:
        self._settings = settings
        self._master = master
        self.models_loaded = 0

    def run(self, batches: Iterator[Batch]) -> Generator[BatchResults, None, None]:
        """Score batches; their results come in the order in which they are ready."""
        _check_installation()
        _check_reachable(self._master)
        with tempfile.TemporaryDirectory(prefix="phi3-mlflow-spark-") as folder:
            session = _session(self._master)
            try:
                yield from self._run(session, batches, Path(folder))
            finally:
                session.stop()

    def _run(self, session: Any, batches: Iterator[Batch], folder: Path) -> Iterator[BatchResults]:
        context = session.sparkContext
        context.addPyFile(str(_packed_code(folder)))
        settings = replace(
            self._settings, threads=int(context.getConf().get("spark.task.cpus", "1"))
        )
        local = self._master.startswith("local")
        if local:
            cores = max(1, usable_cores() // context.defaultParallelism)
            settings = replace(settings, threads=max(settings.threads, cores))
        else:
            context.addArchive(f"{_packed_model(Path(settings.model), folder)}#{_ARCHIVE}")
        do = _task(settings, shipped=not local)
        running: set[Future[list[Any]]] = set()
        with ThreadPoolExecutor(max_workers=256) as pool:
            try:
                while True:
                    while len(running) < _QUEUED * context.defaultParallelism:
                        batch = next(batches, None)
                        if batch is None:
                            break
                        running.add(pool.submit(_job, session, batch, do))
                    if not running:
                        return
                    ready, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in ready:
                        yield self._scored(future)
            except BaseException:
                context.cancelAllJobs()
                raise

    def _scored(self, future: Future[list[Any]]) -> BatchResults:
        try:
            rows = future.result()
        except Exception as error:
            reason = str(error).strip().splitlines()
            raise EnvironmentProblem(
                f"Spark ({self._master}) could not do a batch: "
                f"{type(error).__name__}: {_last_words(reason)}"
            ) from error
        self.models_loaded += any(row["fresh"] for row in rows)
        return [(row["index"], Result(*(row[name] for name in COLUMNS))) for row in rows]


def _job(session: Any, batch: Batch, do: Callable[[Any], Any]) -> list[Any]:
    frame = session.createDataFrame(batch, "index long, request string").coalesce(1)
    rows: list[Any] = frame.mapInPandas(do, _SCHEMA).collect()
    return rows


def _task(settings: WorkerSettings, shipped: bool) -> Callable[[Iterator[Any]], Iterator[Any]]:
    """What an executor does with the rows of a batch."""

    def do(frames: Iterator[Any]) -> Iterator[Any]:
        import pandas
        from pyspark import SparkFiles

        mine = settings
        if shipped:
            mine = replace(settings, model=_unpacked(SparkFiles.get(_ARCHIVE)))
        for frame in frames:
            batch = list(zip(frame["index"].tolist(), frame["request"].tolist(), strict=True))
            values, fresh = answer_batch(mine, batch)
            rows = [[index, *v, fresh] for (index, _), v in zip(batch, values, strict=True)]
            # As objects: a column of tokens with a gap would become one of floats.
            yield pandas.DataFrame(rows, columns=["index", *COLUMNS, "fresh"], dtype=object)

    return do


def _unpacked(path: str) -> str:
    """The model's folder inside what Spark unpacked."""
    return str(Path(path) / "model")


def _session(master: str) -> Any:
    from pyspark.sql import SparkSession

    here = master.startswith(("local", "spark://127.0.0.1", "spark://localhost"))
    if here and not os.environ.get("PYSPARK_PYTHON"):
        os.environ["PYSPARK_PYTHON"] = sys.executable
    builder = (
        SparkSession.builder.appName("phi3-mlflow score")
        .master(master)
        .config("spark.ui.enabled", "false")
        .config("spark.ui.showConsoleProgress", "false")
        .config("spark.python.worker.reuse", "true")
        .config("spark.log.level", "ERROR")
    )
    if here:
        builder = builder.config("spark.driver.host", "127.0.0.1")
        builder = builder.config("spark.driver.bindAddress", "127.0.0.1")
    try:
        return builder.getOrCreate()
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise EnvironmentProblem(
            f"Spark does not start on {master}: {type(error).__name__}: {_last_words(reason)}"
        ) from error


def _last_words(lines: list[str]) -> str:
    """Of a traceback from an executor the line that says what it is about."""
    told = [line for line in lines if line and not line.startswith((" ", "\t", "at "))]
    return (told or lines or [""])[-1][:500]


def _packed_code(folder: Path) -> Path:
    """The package's own modules, for executors that have the libraries but not the project."""
    target = folder / "phi3_mlflow_code.zip"
    with zipfile.ZipFile(target, "w") as archive:
        for file in sorted(_PACKAGE.rglob("*.py")):
            archive.write(file, file.relative_to(_PACKAGE.parent).as_posix())
    return target


def _packed_model(model: Path, folder: Path) -> Path:
    """The model as an archive that Spark unpacks on every node; not compressed, weights do not."""
    target = folder / "model.tar"
    free, size = shutil.disk_usage(folder).free, sum(f.stat().st_size for f in model.rglob("*"))
    if size > free:
        raise EnvironmentProblem(
            f"{folder} has {free / 1e9:.1f} GB free, and the model for the executors takes "
            f"{size / 1e9:.1f} GB. Point TMPDIR to a larger disk."
        )
    with tarfile.open(target, "w", dereference=True) as archive:
        archive.add(model, "model")
    return target


def _check_installation() -> None:
    import importlib.util

    if importlib.util.find_spec("pyspark") is None:
        raise EnvironmentProblem(
            "engine = 'spark' needs pyspark, which is not installed. Install it:\n"
            "  python -m pip install -c requirements/constraints.txt "
            "-c requirements/constraints-spark.txt -r requirements/spark.txt"
        )
    home = os.environ.get("JAVA_HOME")
    if not (home and (Path(home) / "bin" / "java").is_file()) and not shutil.which("java"):
        raise EnvironmentProblem(
            "engine = 'spark' needs Java 17 or later, and there is no `java` on the PATH. "
            "Install it (Debian: apt-get install openjdk-17-jre-headless), or set JAVA_HOME."
        )


def _check_reachable(master: str) -> None:
    """Spark itself would try for a minute before it says so."""
    import socket
    from urllib.parse import urlsplit

    address = urlsplit(master.partition(",")[0])  # several masters may be named, for failover
    if address.scheme != "spark" or "," in master:
        return
    try:
        socket.create_connection((address.hostname or "", address.port or 7077), 10).close()
    except OSError as error:
        raise EnvironmentProblem(
            f"Spark's master {master} does not answer: {error.strerror or error}"
        ) from error


def check_master(text: str) -> str:
    """A master's address.

    Raises:
        UserError: it has none of the forms that Spark takes.
    """
    import re

    if re.fullmatch(r"local(\[(\d+|\*)\])?|(spark|k8s)://\S+|yarn", text):
        return text
    raise UserError(
        f"parameter: master = {text!r}: allowed are local[N], spark://HOST:PORT, yarn, "
        "k8s://... and auto (this machine)"
    )
