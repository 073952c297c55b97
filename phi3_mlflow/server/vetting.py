"""JSON schemas are tried before a request takes a place: so a bad one holds up no answer."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from phi3_mlflow.server.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phi3_mlflow.server.backend import Backend

MOST_WAITING = 16
"""New schemas; each takes a second or two at most."""
_RETRY_S = 5


class Vetting:
    """Tries the schemas of requests one after another, in a thread of its own.

    To be used from one event loop.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="schema")
        self._waiting = 0

    async def vet(self, backend: Backend, wanted: Sequence[Any]) -> None:
        """See that answers can be held to what requests demand.

        A model that version 0.1 or another project logged does not say; it refuses by itself.

        Raises:
            RequestError: they cannot.
            ApiError: too many new schemas are waiting (429, with Retry-After).
        """
        vetted, vet = getattr(backend, "vetted", None), getattr(backend, "vet", None)
        if vetted is None or vet is None:
            return
        for one in wanted:
            if vetted(one):
                vet(one)
                continue
            if self._waiting >= MOST_WAITING:
                raise ApiError(
                    429,
                    f"{self._waiting} JSON schemas that were not seen before are being looked at; "
                    f"try again in {_RETRY_S} s",
                    "queue_full",
                    headers={"Retry-After": str(_RETRY_S)},
                )
            self._waiting += 1
            try:
                await asyncio.get_running_loop().run_in_executor(self._thread, vet, one)
            finally:
                self._waiting -= 1

    def close(self) -> None:
        """Try no more."""
        self._thread.shutdown(wait=False, cancel_futures=True)
