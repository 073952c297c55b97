"""Bring bytes over HTTP from a server that throttles, cuts, stalls and lies.

huggingface_hub's own download is not used for this: it does not compute sha256 while streaming
(a second pass over gigabytes), reads Retry-After only as seconds, has no total time limit, and its
partial files are not tied to the content they are part of. What is its to know (addresses, token,
headers, the reading of a listing) is taken from it, see `hub.py`. httpx is the client it uses too,
so proxies and certificates are configured the same way.
"""

from __future__ import annotations

import email.utils
import logging
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urljoin, urlsplit

from phi3_mlflow.core.errors import EnvironmentProblem, ProjectError
from phi3_mlflow.sources.digests import CHUNK, DigestingFile, Expected, FileDigest

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")
Inspect = Callable[["httpx.Response"], None]

_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MOST_REDIRECTS = 5
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


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
        """Start counting; None is no limit."""
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


class Transfer:
    """Requests to one origin and wherever it redirects to, under one policy and deadline.

    Args:
        origin: `https://host`, the only place that is sent `headers`.
        headers: sent to the origin, such as an Authorization; never to where it redirects.
        policy: retries and time-outs.
        deadline: of the whole fetch.
        refuse: turns the final answer to a request (not to be retried) into an error, given what
            was asked for and the response.
    """

    def __init__(
        self,
        origin: str,
        headers: Mapping[str, str],
        policy: RetryPolicy,
        deadline: Deadline,
        refuse: Callable[[str, httpx.Response], ProjectError],
    ) -> None:
        import httpx

        _keep_secrets_out_of_logs()
        self._origin = _origin(origin)
        self._headers = dict(headers)
        self._policy = policy
        self._deadline = deadline
        self._refuse = refuse
        self._client = httpx.Client(follow_redirects=False, headers={"Accept-Encoding": "identity"})

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def __enter__(self) -> Transfer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(self, url: str, what: str, largest: int) -> bytes:
        """A whole answer in memory.

        Args:
            url: at the origin.
            what: named in errors.
            largest: bytes; more is an error.
        """

        def attempt() -> bytes:
            body = bytearray()
            with self._open(url, what, {}) as response:
                if response.status_code != 200:
                    raise self._refuse(what, response)
                for chunk in self._chunks(response, what):
                    body += chunk
                    if len(body) > largest:
                        raise EnvironmentProblem(
                            f"{what}: the answer is larger than {largest} bytes"
                        )
            return bytes(body)

        return self._persist(what, attempt)

    def download(
        self,
        url: str,
        writer: DigestingFile,
        expected: Expected,
        what: str,
        advance: Callable[[int], None],
        inspect: Inspect | None = None,
    ) -> FileDigest:
        """Bring a file until it is what it must be; goes on where `writer` stands.

        Args:
            url: at the origin.
            writer: the file; may hold a beginning of it.
            expected: size (required) and digests.
            what: the file's name, for errors.
            advance: told of every byte; of bytes that are thrown away as a negative number.
            inspect: shown every answer of the origin before its body is read; may raise.

        Returns:
            Size and sha256 of what was written, equal to `expected`.

        Raises:
            EnvironmentProblem: it could not be had, or is not what it must be; `writer` is empty
                in the second case.
        """
        if expected.size is None:
            raise ValueError("the size of a download must be known")
        mismatches = 0
        # A server that cuts after every few bytes must not be followed for ever.
        enough = min(1 << 20, max(1, expected.size // 100))

        def attempt() -> FileDigest:
            nonlocal mismatches
            before = writer.size
            try:
                self._stream(url, writer, expected.size or 0, what, advance, inspect)
            except Transient as failure:
                failure.progressed = writer.size - before >= enough
                raise
            digest, blob = writer.digest()
            wrong = mismatch(what, expected, digest, blob)
            if not wrong:
                return digest
            advance(-writer.size)
            writer.restart()
            mismatches += 1
            if mismatches > 1:
                raise EnvironmentProblem(wrong + "\nNothing of it is kept.")
            # Bytes that were on the disk since an earlier attempt may be the ones that are wrong.
            raise Transient(wrong)

        return self._persist(what, attempt)

    def _persist(self, what: str, attempt: Callable[[], T]) -> T:
        """Run an attempt until it succeeds, fails for good, or too many failed in a row."""
        policy, failures = self._policy, 0
        while True:
            self._deadline.check(what)
            try:
                return attempt()
            except Transient as failure:
                failures = 1 if failure.progressed else failures + 1
                if failures >= policy.attempts:
                    raise EnvironmentProblem(
                        f"{what}: given up after {failures} attempts, the last one: {failure}. "
                        "What came down is kept: run again to go on."
                    ) from None
                self._pause(what, failure, failures)

    def _pause(self, what: str, failure: Transient, failures: int) -> None:
        policy = self._policy
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
        if wait >= self._deadline.remaining():
            raise EnvironmentProblem(
                f"{what}: {failure}; waiting {wait:.0f} s would pass the time limit of "
                f"{self._deadline.limit_s:g} s. What came down is kept: run again to go on."
            )
        policy.sleep(wait)

    def _stream(
        self,
        url: str,
        writer: DigestingFile,
        size: int,
        what: str,
        advance: Callable[[int], None],
        inspect: Inspect | None,
    ) -> None:
        """One request for what is missing, written as it comes."""

        def again() -> None:
            advance(-writer.size)
            writer.restart()

        if writer.size > size:
            again()
        if writer.size == size:
            return
        headers = {"Range": f"bytes={writer.size}-"} if writer.size else {}
        with self._open(url, what, headers, inspect) as response:
            if response.status_code == 416:
                again()
                raise Transient("the server does not have the rest of the file (416)")
            if response.status_code == 200:
                if writer.size:
                    again()
            elif response.status_code != 206:
                raise self._refuse(what, response)
            elif problem := _range_problem(response, writer.size, size):
                again()
                raise Transient(problem)
            stated = response.headers.get("Content-Length", "")
            encoded = response.headers.get("Content-Encoding", "identity") != "identity"
            if encoded and writer.size:
                again()
                raise Transient("a part of the file came compressed")
            missing = size - writer.size
            if stated.isdigit() and not encoded and int(stated) != missing:
                raise Transient(f"the server announces {stated} bytes where {missing} are missing")
            self._fill(self._chunks(response, what), writer, size, advance)
        if writer.size < size:
            raise Transient(f"the connection ended after {writer.size} of {size} bytes")

    def _fill(
        self,
        chunks: Iterator[bytes],
        writer: DigestingFile,
        size: int,
        advance: Callable[[int], None],
    ) -> None:
        """Write in large pieces; what came before a failure is written too."""
        pending = bytearray()

        def flush() -> None:
            nonlocal pending
            if pending:
                writer.write(pending)  # type: ignore[arg-type]
                pending = bytearray()

        try:
            for chunk in chunks:
                if writer.size + len(pending) + len(chunk) > size:
                    pending.clear()
                    advance(-writer.size)
                    writer.restart()
                    raise Transient(f"the server sends more than the file's {size} bytes")
                pending += chunk
                if len(pending) >= CHUNK:
                    advance(len(pending))
                    flush()
        finally:
            advance(len(pending))
            flush()

    def _chunks(self, response: httpx.Response, what: str) -> Iterator[bytes]:
        """The body as it comes, under the deadline and the rule against stalling."""
        import httpx

        policy = self._policy
        since, received = policy.clock(), 0
        try:
            for chunk in response.iter_bytes():
                yield chunk
                self._deadline.check(what)
                received += len(chunk)
                now = policy.clock()
                if now - since >= policy.stall_window_s:
                    if received < policy.slowest_bytes_per_s * (now - since):
                        raise Transient(f"only {received} bytes came in {now - since:.0f} s")
                    since, received = now, 0
        except httpx.HTTPError as error:
            self._deadline.check(what)
            raise Transient(_describe(error)) from None

    @contextmanager
    def _open(
        self, url: str, what: str, headers: Mapping[str, str], inspect: Inspect | None = None
    ) -> Iterator[httpx.Response]:
        """Send a request, follow redirects, and yield the answer with its body unread."""
        response = self._send(url, what, headers)
        try:
            for _ in range(_MOST_REDIRECTS):
                if inspect and _origin(str(response.url)) == self._origin:
                    inspect(response)
                if response.status_code not in _REDIRECTS:
                    break
                target = _redirect_target(response, what)
                response.close()
                response = self._send(target, what, headers)
            else:
                raise EnvironmentProblem(f"{what}: more than {_MOST_REDIRECTS} redirects")
            if response.status_code in _TRANSIENT:
                raise Transient(
                    f"{_place(str(response.url))} answers {response.status_code}",
                    retry_after(response.headers),
                )
            yield response
        finally:
            response.close()

    def _send(self, url: str, what: str, headers: Mapping[str, str]) -> httpx.Response:
        import httpx

        self._deadline.check(what)
        policy, left = self._policy, self._deadline.remaining()
        # What was given for the origin (a token above all) stays with the origin.
        own = self._headers if _origin(url) == self._origin else {}
        try:
            request = self._client.build_request(
                "GET",
                url,
                headers={**own, **headers},
                timeout=httpx.Timeout(
                    min(policy.read_timeout_s, left), connect=min(policy.connect_timeout_s, left)
                ),
            )
            return self._client.send(request, stream=True)
        except httpx.TransportError as error:
            if isinstance(error, httpx.UnsupportedProtocol):
                raise EnvironmentProblem(f"{what}: {_place(url)} is no HTTP address") from None
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise EnvironmentProblem(
                    f"{what}: the certificate of {_place(url)} is not trusted. When a proxy of "
                    "yours signs it, name its authority in SSL_CERT_FILE."
                ) from None
            self._deadline.check(what)
            raise Transient(f"{_place(url)}: {_describe(error)}") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise EnvironmentProblem(f"{what}: {_place(url)}: {_describe(error)}") from None


def mismatch(what: str, expected: Expected, found: FileDigest, blob: str | None = None) -> str:
    """What differs between a file and what it must be, as text; empty when nothing does."""
    pairs = (
        ("size", expected.size, found.size),
        ("sha256", expected.sha256, found.sha256),
        ("git blob", expected.git_blob, blob if expected.git_blob else None),
    )
    wrong = [(name, want, have) for name, want, have in pairs if want is not None and want != have]
    if not wrong:
        return ""
    facts = "; ".join(f"{name} expected {want}, found {have}" for name, want, have in wrong)
    return f"{what} is not what it must be: {facts}"


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
    from huggingface_hub.utils import parse_ratelimit_headers

    limit = parse_ratelimit_headers(headers)
    return float(limit.reset_in_seconds) if limit and limit.remaining == 0 else None


def _range_problem(response: httpx.Response, start: int, size: int) -> str:
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if not match:
        return "a part of the file came without saying which (no Content-Range)"
    first, last, total = match.groups()
    if int(first) != start or int(last) != size - 1 or total not in ("*", str(size)):
        return f"bytes {start}-{size - 1}/{size} were asked for, {match[0]!r} came"
    return ""


def _redirect_target(response: httpx.Response, what: str) -> str:
    location = response.headers.get("Location")
    if not location:
        raise EnvironmentProblem(f"{what}: a redirect that does not say where to")
    try:
        target = urljoin(str(response.url), location)
        scheme = _origin(target)[0]
    except ValueError:
        raise EnvironmentProblem(f"{what}: a redirect to an unreadable address") from None
    if scheme not in ("http", "https"):
        raise EnvironmentProblem(f"{what}: a redirect to {scheme or 'no'} scheme is not followed")
    if response.url.scheme == "https" and scheme != "https":
        raise EnvironmentProblem(f"{what}: a redirect from https to http is not followed")
    return target


def _origin(url: str) -> tuple[str, str, int]:
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return parts.scheme, (parts.hostname or "").lower(), port


def _place(url: str) -> str:
    """An address to show: a signed one carries its signature in the query, which is left out."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _describe(error: Exception) -> str:
    """A failure of the connection in words; httpx often says nothing or a class name."""
    import httpx

    kinds = (
        (httpx.ConnectTimeout, "no connection in time"),
        (httpx.TimeoutException, "no answer in time"),
        (httpx.ConnectError, "no connection"),
        (httpx.ProxyError, "the proxy refuses"),
        (httpx.RemoteProtocolError, "the connection was cut"),
        (httpx.NetworkError, "the connection was cut"),
        (httpx.DecodingError, "the body is not in the encoding it claims"),
    )
    return next((text for kind, text in kinds if isinstance(error, kind)), type(error).__name__)


class _NothingSecret(logging.Filter):
    """What httpx and httpcore log holds signed addresses and whatever a server sends back."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name.startswith("httpcore"):
            record.msg, record.args = record.getMessage().partition(" ")[0], ()
        elif isinstance(record.args, tuple):
            record.args = tuple(
                _place(str(arg)) if type(arg).__name__ == "URL" else arg for arg in record.args
            )
        return True


def _keep_secrets_out_of_logs() -> None:
    names = ("httpx", *(f"httpcore.{part}" for part in ("connection", "http11", "http2", "proxy")))
    for logger in map(logging.getLogger, names):
        if not any(isinstance(known, _NothingSecret) for known in logger.filters):
            logger.addFilter(_NothingSecret())
