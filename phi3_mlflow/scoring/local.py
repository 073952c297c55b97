"""The local engine: worker processes on this machine, each with one loaded model.

A row is answered by the very computation of `predict`, one token at a time, so its answer does
not depend on how many workers there are or which one it comes to. Several workers with one thread
each make more of the cores than one worker with all of them, because the threads of one small
matrix product wait for each other.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING

from phi3_mlflow.core.endings import ending
from phi3_mlflow.core.errors import EnvironmentProblem
from phi3_mlflow.core.machine import available_memory, usable_cores
from phi3_mlflow.scoring.requests import Result
from phi3_mlflow.scoring.worker import WorkerSettings, answer_batch

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from multiprocessing.process import BaseProcess
    from pathlib import Path

Batch = list[tuple[int, str]]
"""Index and request, as JSON, of each row."""
BatchResults = list[tuple[int, Result]]

MOST_WORKERS = 4
_MOST_DEATHS = 3  # one after the other: it is not the rows, then
_MEMORY_SHARE = 0.5
_PROCESS_BYTES = 400_000_000  # Python with MLflow and a runtime, without the model


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    batch: Batch = field(default_factory=list)


class LocalEngine:
    """Answers batches with worker processes.

    Args:
        settings: which model, and how it is asked.
        workers: how many processes.
    """

    def __init__(self, settings: WorkerSettings, workers: int) -> None:
        self._settings = settings
        self._wanted = workers
        self._workers: list[_Worker] = []
        self._deaths = 0  # since the last answer
        self.models_loaded = 0

    def run(self, batches: Iterator[Batch]) -> Generator[BatchResults, None, None]:
        """Score batches; their results come in the order in which they are ready.

        A worker that dies over a batch is replaced, and the batch is done again one row at a time:
        the row that kills its worker a second time, alone, has that as its error.

        Raises:
            EnvironmentProblem: the model cannot be loaded, or workers die one after the other.
        """
        waiting: deque[Batch] = deque()
        try:
            while True:
                self._give_work(waiting, batches)
                busy = [worker for worker in self._workers if worker.batch]
                if not busy:
                    return
                ready = wait([worker.pipe for worker in busy])
                for worker in [worker for worker in busy if worker.pipe in ready]:
                    if scored := self._take(worker, waiting):
                        yield scored
        finally:
            self.close()

    def close(self) -> None:
        """End the workers, whatever they are doing."""
        for worker in self._workers:
            worker.pipe.close()
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
        self._workers.clear()

    def _give_work(self, waiting: deque[Batch], batches: Iterator[Batch]) -> None:
        idle = [worker for worker in self._workers if not worker.batch]
        while idle or len(self._workers) < self._wanted:
            batch = waiting.popleft() if waiting else next(batches, None)
            if batch is None:
                return
            worker = idle.pop() if idle else self._start()
            worker.batch = batch
            try:
                worker.pipe.send(batch)
            except ConnectionError:  # it died while it had nothing to do; `_take` finds that out
                continue

    def _start(self) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, self._settings), daemon=True)
        process.start()
        theirs.close()
        worker = _Worker(process, ours)
        self._workers.append(worker)
        return worker

    def _take(self, worker: _Worker, waiting: deque[Batch]) -> BatchResults | None:
        try:
            values, fresh = worker.pipe.recv()
        except (EOFError, ConnectionError):
            return self._bury(worker, waiting)
        if isinstance(values, BaseException):
            raise EnvironmentProblem(
                f"{self._settings.model} cannot be loaded: {values}"
            ) from values
        self.models_loaded += fresh
        self._deaths = 0
        done, worker.batch = worker.batch, []
        return [(index, Result(*v)) for (index, _), v in zip(done, values, strict=True)]

    def _bury(self, worker: _Worker, waiting: deque[Batch]) -> BatchResults | None:
        worker.process.join()
        self._workers.remove(worker)
        self._deaths += 1
        code = worker.process.exitcode
        if not self.models_loaded or self._deaths > _MOST_DEATHS:
            raise EnvironmentProblem(
                f"one process that holds the model after the other {ending(code)}. What is done is "
                "kept; with fewer workers (-P workers=1) less memory is taken"
            )
        if len(worker.batch) == 1:
            return [(worker.batch[0][0], Result(error=f"the process died over this row ({code=})"))]
        waiting.extend([row] for row in worker.batch)
        return None


def _work(pipe: Connection, settings: WorkerSettings) -> None:
    """What a worker process does until its parent is gone."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        while True:
            batch = pipe.recv()
            try:
                pipe.send(answer_batch(settings, batch))
            except ConnectionError:
                return
            except Exception as error:  # of loading: a row's own end in its result
                pipe.send((RuntimeError(f"{type(error).__name__}: {error}"), False))
    except (EOFError, KeyboardInterrupt):
        return


def _end_with_parent() -> None:
    """A parent that is killed cannot end its workers: they see to it themselves."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def fitting_workers(model: Path) -> int:
    """How many workers this machine takes: one per core up to four, as far as memory allows.

    A worker is counted with twice the model's size: runtimes repack the weights.
    """
    workers = min(usable_cores(), MOST_WORKERS)
    memory = available_memory()
    if memory is None:
        return workers
    size = sum(file.stat().st_size for file in model.rglob("*") if file.is_file())
    return max(1, min(workers, int(memory * _MEMORY_SHARE // (2 * size + _PROCESS_BYTES))))
