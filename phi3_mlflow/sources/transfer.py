"""Bring bytes over HTTP from a server that throttles, cuts, stalls and lies.

huggingface_hub's own download is not used for this: it does not compute sha256 while streaming
(a second pass over gigabytes), reads Retry-After only as seconds, has no total time limit, and its
partial files are not tied to the content they are part of. What is its to know (addresses, token,
headers, the reading of a listing) is taken from it, see `hub.py`. httpx is the client it uses too,
so proxies and certificates are configured the same way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from phi3_mlflow.core.errors import EnvironmentProblem, ProjectError
from phi3_mlflow.sources.addresses import keep_secrets_out_of_logs, redirect_target, shown
from phi3_mlflow.sources.addresses import origin as origin_of
from phi3_mlflow.sources.digests import CHUNK, DigestingFile, Expected, FileDigest, mismatch
from phi3_mlflow.sources.retrying import Deadline, RetryPolicy, Transient, persist, retry_after

if TYPE_CHECKING:
    import httpx

Inspect = Callable[["httpx.Response"], None]

_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MOST_REDIRECTS = 5
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


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

        keep_secrets_out_of_logs()
        self._origin = origin_of(origin)
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

        return persist(what, attempt, self._policy, self._deadline)

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
        # A server that cuts after every few bytes must not be followed forever.
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

        return persist(what, attempt, self._policy, self._deadline)

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
                if inspect and origin_of(str(response.url)) == self._origin:
                    inspect(response)
                if response.status_code not in _REDIRECTS:
                    break
                target = redirect_target(response, what)
                response.close()
                response = self._send(target, what, headers)
            else:
                raise EnvironmentProblem(f"{what}: more than {_MOST_REDIRECTS} redirects")
            if response.status_code in _TRANSIENT:
                raise Transient(
                    f"{shown(str(response.url))} answers {response.status_code}",
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
        own = self._headers if origin_of(url) == self._origin else {}
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
                raise EnvironmentProblem(f"{what}: {shown(url)} is not an HTTP address") from None
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise EnvironmentProblem(
                    f"{what}: the certificate of {shown(url)} is not trusted. When a proxy of "
                    "yours signs it, name its authority in SSL_CERT_FILE."
                ) from None
            self._deadline.check(what)
            raise Transient(f"{shown(url)}: {_describe(error)}") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise EnvironmentProblem(f"{what}: {shown(url)}: {_describe(error)}") from None


def _range_problem(response: httpx.Response, start: int, size: int) -> str:
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if not match:
        return "a part of the file came without saying which (no Content-Range)"
    first, last, total = match.groups()
    if int(first) != start or int(last) != size - 1 or total not in ("*", str(size)):
        return f"bytes {start}-{size - 1}/{size} were asked for, {match[0]!r} came"
    return ""


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
