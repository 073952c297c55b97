"""How long to go on against a server that does not deliver, and when to stop."""

from __future__ import annotations

import email.utils
import random
import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TypeVar

from phi3_mlflow.core.errors import EnvironmentProblem

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

T = TypeVar("T")


@dataclass(frozen=True)
class RetryPolicy:
    """How long to go on against a server that does not deliver.

    Attributes:
        attempts: how many in a row may fail without bringing anything.
        first_wait_s: back-off after the first failure; doubles with every further one.
        longest_wait_s: where the doubling ends.
        longest_retry_after_s: a server that asks for a longer pause is given up at once.
        connect_timeout_s: for a connection to open.
        read_timeout_s: for the next byte to come.
        slowest_bytes_per_s: a connection slower than this is dropped and opened again.
        stall_window_s: over which that is measured.
        sleep: takes seconds; replaced in tests.
        clock: seconds that only grow; replaced in tests.
    """

    attempts: int = 6
    first_wait_s: float = 1.0
    longest_wait_s: float = 60.0
    longest_retry_after_s: float = 600.0
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 30.0
    slowest_bytes_per_s: float = 1024.0
    stall_window_s: float = 60.0
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic


class Deadline:
    """The total time a fetch may take."""

    def __init__(self, limit_s: float | None, policy: RetryPolicy) -> None:
        """Start counting the seconds; None sets no limit."""
        self.limit_s = limit_s
        self._clock = policy.clock
        self._end = None if limit_s is None else policy.clock() + limit_s

    def remaining(self) -> float:
        """Seconds left, possibly infinite."""
        return float("inf") if self._end is None else self._end - self._clock()

    def check(self, what: str) -> None:
        """Raise EnvironmentProblem when the time is used up."""
        if self.remaining() <= 0:
            raise self.passed(what)

    def passed(self, what: str) -> EnvironmentProblem:
        """The error that says so."""
        return EnvironmentProblem(
            f"{what}: the time limit of {self.limit_s:g} s for fetching is used up. What came down "
            "is kept: run again to go on, or give more time."
        )


class Transient(Exception):
    """An attempt failed in a way that another one may not."""

    def __init__(
        self, reason: str, retry_after: float | None = None, progressed: bool = False
    ) -> None:
        super().__init__(reason)
        self.retry_after = retry_after
        self.progressed = progressed


def persist(what: str, attempt: Callable[[], T], policy: RetryPolicy, deadline: Deadline) -> T:
    """Run an attempt until it succeeds, fails for good, or too many failed in a row.

    Args:
        what: named in errors.
        attempt: raises `Transient` where another attempt may succeed.
        policy: how many attempts, and how long to wait between them.
        deadline: of the whole fetch.

    Returns:
        What the attempt returned.

    Raises:
        EnvironmentProblem: too many attempts failed in a row, or there is no time for another.
    """
    failures = 0
    while True:
        deadline.check(what)
        try:
            return attempt()
        except Transient as failure:
            failures = 1 if failure.progressed else failures + 1
            if failures >= policy.attempts:
                raise EnvironmentProblem(
                    f"{what}: given up after {failures} attempts, the last one: {failure}. "
                    "What came down is kept: run again to go on."
                ) from None
            _pause(what, failure, failures, policy, deadline)


def _pause(
    what: str, failure: Transient, failures: int, policy: RetryPolicy, deadline: Deadline
) -> None:
    """Wait as long as the server asks, or longer after every failure."""
    if failure.retry_after is not None:
        wait = failure.retry_after
        if wait > policy.longest_retry_after_s:
            raise EnvironmentProblem(
                f"{what}: {failure}, and asks to come back in {wait:.0f} s; the longest wait "
                f"is {policy.longest_retry_after_s:.0f} s. Run again then."
            )
    else:
        wait = min(policy.longest_wait_s, policy.first_wait_s * 2 ** (failures - 1))
        # Many runs that failed together must not come back together.
        wait *= random.uniform(0.5, 1.0)
    if wait >= deadline.remaining():
        raise EnvironmentProblem(
            f"{what}: {failure}; waiting {wait:.0f} s would pass the time limit of "
            f"{deadline.limit_s:g} s. What came down is kept: run again to go on."
        )
    policy.sleep(wait)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds a server asks to wait: Retry-After (seconds or a date), else a rate limit's reset."""
    value = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d{1,9}(\.\d+)?", value):
        return float(value)
    if value:
        try:
            moment = email.utils.parsedate_to_datetime(value)
        except ValueError:
            return None
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        return max(0.0, (moment - datetime.now(UTC)).total_seconds())
    from huggingface_hub.utils import (  # type: ignore[attr-defined, unused-ignore]
        parse_ratelimit_headers,
    )

    limit = parse_ratelimit_headers(headers)
    return float(limit.reset_in_seconds) if limit and limit.remaining == 0 else None
