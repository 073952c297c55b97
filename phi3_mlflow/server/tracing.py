"""Requests as MLflow traces, written when the answer is out."""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from phi3_mlflow.tracking.connection import connect

if TYPE_CHECKING:
    from collections.abc import Mapping

    from phi3_mlflow.server.exchange import RequestStats
    from phi3_mlflow.server.settings import Trace

log = logging.getLogger("phi3_mlflow.server")
_MOST_PENDING = 1000


class Tracer:
    """Writes traces in a thread of its own.

    Args:
        trace: `off`, `figures` (no texts) or `full`.
    """

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="trace")
        self._pending = 0
        if trace != "off":
            connect()

    @property
    def on(self) -> bool:
        """Whether traces are written."""
        return self._trace != "off"

    @property
    def with_texts(self) -> bool:
        """Whether they hold what was asked and said."""
        return self._trace == "full"

    def write(
        self, name: str, model: str, stats: RequestStats, request: Mapping[str, Any], answer: str
    ) -> None:
        """Write a request that has just ended.

        Args:
            name: of the trace.
            model: that answered.
            stats: of the request.
            request: what was asked; left out unless the texts are wanted.
            answer: what was said; left out unless the texts are wanted.
        """
        if not self.on:
            return
        if self._pending >= _MOST_PENDING:
            log.warning("a trace was left out: the tracking store does not keep up")
            return
        self._pending += 1
        inputs = request if self.with_texts else None
        outputs = {"text": answer} if self.with_texts else None
        ended = time.time_ns()
        self._thread.submit(self._write, name, model, stats, inputs, outputs, ended)

    def close(self) -> None:
        """Wait until all is written."""
        self._thread.shutdown(wait=True)
        if self.on:
            import mlflow

            mlflow.flush_trace_async_logging()

    def _write(
        self, name: str, model: str, stats: RequestStats, inputs: Any, outputs: Any, ended: int
    ) -> None:
        import mlflow

        try:
            attributes: dict[str, Any] = {
                "model": model,
                "model_version": stats.version,
                "outcome": stats.outcome,
                "time_to_first_token_s": stats.first_s,
                "tokens_per_s": stats.tokens_per_s,
                "mlflow.chat.tokenUsage": {
                    "input_tokens": stats.prompt_tokens,
                    "output_tokens": stats.tokens,
                    "total_tokens": stats.prompt_tokens + stats.tokens,
                },
            }
            span = mlflow.start_span_no_context(
                name,
                span_type="CHAT_MODEL",
                inputs=inputs,
                start_time_ns=ended - int(stats.total_s * 1e9),
            )
            failed = stats.outcome in ("failed", "timed_out")
            span.end(
                outputs=outputs,
                attributes={key: value for key, value in attributes.items() if value is not None},
                status="ERROR" if failed else "OK",
                end_time_ns=ended,
            )
        except Exception as error:  # a store that is away must not cost an answer
            log.warning("a trace was not written: %s", type(error).__name__)
        finally:
            self._pending -= 1
