"""Where step outputs are kept: a content-addressed cache outside the checkout.

    ROOT/outputs/STEP/KEY/output/...        the files of the output, with manifest.json
    ROOT/outputs/STEP/KEY/origin.json       the key's parts, the run that did the work, its figures
    ROOT/outputs/STEP/KEY/verified.json     what the files looked like when their hashes were read
    ROOT/latest/PROFILE/STEP.json           what a step last left for a profile
    ROOT/building/STEP-KEY-*/               work in progress, never read by anyone else
    ROOT/downloads/                         partial downloads
    ROOT/locks/                             STEP-KEY.lock: who builds; STEP-KEY.use: who reads

An output appears by one rename of its KEY directory, or not at all. Work in progress belongs to
whoever holds the lock of its key, so what is found there under the lock is debris.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_mlflow.artifacts.manifests import MANIFEST_NAME, Manifest, walk_files
from phi3_mlflow.artifacts.stamps import stamp_of, write_json
from phi3_mlflow.core.errors import EnvironmentProblem, ProjectError, UserError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

_KEY_LENGTH = 40
_MEANS_DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO)
_FULL_BYTES = 1 << 20
_FULL_FILES = 16
# numpy's tofile loses the error's number; safetensors and SQLite pass it on as text.
_FULL_IN_WORDS = re.compile(
    r"^\d+ requested and \d+ written$|\(os error 28\)|database or disk is full"
)


def cache_root() -> Path:
    """The cache's folder: `PHI3_MLFLOW_CACHE`, else `phi3-mlflow` in the user's cache folder."""
    configured = os.environ.get("PHI3_MLFLOW_CACHE")
    if configured:
        return Path(configured).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "phi3-mlflow"


def key_of(parts: Mapping[str, Any]) -> str:
    """The cache key of a step's work.

    Args:
        parts: everything that decides the output, typed, as JSON values. Values that compare equal
            but differ in type (1, 1.0, "1", true) give different keys.

    Returns:
        A hex string, the same for the same parts whatever the order of their keys.
    """
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:_KEY_LENGTH]


@dataclass(frozen=True)
class Entry:
    """An output in the cache: its files under `path`, and where it came from."""

    step: str
    key: str
    path: Path
    manifest: Manifest
    origin: Mapping[str, Any]

    @property
    def used_at(self) -> float:
        """When it was last made or found whole, in seconds since the epoch."""
        verified = self.path.parent / "verified.json"
        return verified.stat().st_mtime if verified.exists() else float(self.origin["time"])


class StepCache:
    """The cache of step outputs."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or cache_root()

    @property
    def downloads(self) -> Path:
        """Where partial downloads lie."""
        return self.root / "downloads"

    def find(self, step: str, key: str) -> Entry | None:
        """The output of a step, when it is there and whole.

        Every file's hash is compared with the manifest; files that have not been touched since
        they were last read (same size, inode, modification and change time) are not read again.
        A damaged output is removed.
        """
        place = self._place(step, key)
        if not place.is_dir():
            return None
        try:
            entry = self._read(step, key)
            whole = not self._damage(place, entry.manifest)
        except (UserError, ValueError, KeyError):
            whole = False
        except OSError as error:
            if error.errno not in _MEANS_DAMAGE:  # too many open files, say: no fault of the output
                raise EnvironmentProblem(f"{place} cannot be read: {error.strerror}") from error
            whole = False
        if not whole:
            shutil.rmtree(place, ignore_errors=True)
            return None
        return entry

    def holding(self, path: Path) -> Entry | None:
        """The cached output whose files are in this folder, or None when it is no such folder."""
        try:
            step, key, name = path.resolve().relative_to((self.root / "outputs").resolve()).parts
        except ValueError:
            return None
        return self.find(step, key) if name == "output" else None

    @contextmanager
    def locked(self, step: str, key: str) -> Iterator[None]:
        """Be the only one, of all processes, who builds this output."""
        from filelock import FileLock

        locks = self.root / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        with FileLock(str(locks / f"{step}-{key}.lock")):
            for debris in (self.root / "building").glob(f"{step}-{key}-*"):
                shutil.rmtree(debris, ignore_errors=True)
            yield

    @contextmanager
    def settling(self) -> Iterator[None]:
        """Keep `prune` out while outputs are being looked up and marked as used."""
        with self._shared("prune"):
            yield

    @contextmanager
    def using(self, entries: Iterable[Entry | None]) -> Iterator[None]:
        """Keep `prune` from removing outputs that are being read; ends with the process at last."""
        with ExitStack() as held:
            for entry in filter(None, entries):
                held.enter_context(self._shared(f"{entry.step}-{entry.key}.use"))
            yield

    def sweep(self) -> None:
        """Remove the unfinished work of processes that are no more, whatever they were building."""
        from filelock import FileLock, Timeout

        for debris in (self.root / "building").glob("*-*-*"):
            step, key, _ = debris.name.rsplit("-", 2)
            lock = FileLock(str(self.root / "locks" / f"{step}-{key}.lock"), timeout=0)
            with suppress(Timeout), lock:
                shutil.rmtree(debris, ignore_errors=True)

    def entries(self) -> list[Entry]:
        """Every output in the cache, the oldest first; what is damaged is left out."""
        found = []
        for place in (self.root / "outputs").glob("*/*"):
            try:
                found.append(self._read(place.parent.name, place.name))
            except (UserError, OSError, ValueError):
                continue
        return sorted(found, key=lambda entry: entry.used_at)

    def damage(self, entry: Entry) -> list[str]:
        """What differs from an output's manifest, every file read."""
        return entry.manifest.differences(entry.path)

    def remove(self, entry: Entry) -> bool:
        """Remove an output unless somebody builds or reads it; says whether it was removed."""
        from filelock import FileLock, Timeout

        locks = self.root / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        try:
            with (
                FileLock(str(locks / f"{entry.step}-{entry.key}.lock"), timeout=0),
                _flock(locks / "prune", exclusive=True, wait=True),
                _flock(locks / f"{entry.step}-{entry.key}.use", exclusive=True, wait=False),
            ):
                shutil.rmtree(self._place(entry.step, entry.key))
                return True
        except (Timeout, BlockingIOError):
            return False

    def unfinished_downloads(self) -> int:
        """The bytes that downloads hold which have not become an output."""
        return sum(_size(folder) for folder in self.downloads.glob("*"))

    def drop_downloads(self, age_s: float, *, preview: bool = False) -> int:
        """Remove downloads that nobody is at, and has not been for a time; gives their bytes.

        With `preview` they stay, and the bytes are those that would go.
        """
        from filelock import FileLock, Timeout

        dropped = 0
        for folder in self.downloads.glob("*/"):
            newest = max(path.stat().st_mtime for path in [folder, *folder.rglob("*")])
            if time.time() - newest < age_s:
                continue
            # The lock that a fetch holds, see `sources.common.exclusive`.
            with suppress(Timeout), FileLock(str(folder) + ".lock", timeout=0):
                dropped += _size(folder)
                if not preview:
                    shutil.rmtree(folder, ignore_errors=True)
        return dropped

    @contextmanager
    def _shared(self, name: str) -> Iterator[None]:
        locks = self.root / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        with _flock(locks / name, exclusive=False, wait=True):
            yield

    @contextmanager
    def building(self, step: str, key: str, origin: dict[str, Any]) -> Iterator[Path]:
        """Make an output: fill the directory that is yielded; it appears when the block ends.

        The caller holds the lock. When the block raises, nothing is left behind.

        Args:
            step: whose output it is.
            key: of the output.
            origin: what to write down beside it; the caller may add to it inside the block.

        Raises:
            EnvironmentProblem: the disk is full.
        """
        # No hyphen may be in the random part: `sweep` takes the name apart.
        work = self.root / "building" / f"{step}-{key}-{secrets.token_hex(6)}"
        try:
            output = work / "output"
            output.mkdir(parents=True)
            yield output
            manifest = Manifest.of_directory(output)
            manifest.write(output)
            write_json(work / "origin.json", origin)
            write_json(work / "verified.json", _stamps(output))
            _sync_tree(work)
            place = self._place(step, key)
            place.parent.mkdir(parents=True, exist_ok=True)
            if place.exists():  # forced to do it again: the new output takes the old one's place
                shutil.rmtree(place)
            work.rename(place)
            _sync_directory(place.parent)
        except ProjectError:
            raise
        except Exception as error:
            if is_full_disk(error):
                raise EnvironmentProblem(f"{step}: {self._no_space()}") from error
            raise
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _no_space(self) -> str:
        """What to do about a full disk; which one it is, as far as that can be seen."""
        disk = os.statvfs(self.root)
        free = disk.f_bavail * disk.f_frsize
        if free < _FULL_BYTES or (disk.f_files and disk.f_favail < _FULL_FILES):
            return (
                f"no space left on the disk that holds {self.root}.\n"
                "Nothing of the unfinished output was kept. Free some space, or set "
                "PHI3_MLFLOW_CACHE to a folder on a larger disk."
            )
        return (
            f"no space left on a disk. The one that holds {self.root} still has "
            f"{free / 1e9:.1f} GB free: look also at MLflow's database and artifacts, and at the "
            "folder for temporary files (TMPDIR).\n"
            "Nothing of the unfinished output was kept. Free some space, and run it again."
        )

    def set_latest(self, profile: str, slot: str, key: str) -> None:
        """Remember what a step last left for a profile."""
        file = self.root / "latest" / profile / f"{slot}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"key": key, "time": time.time()})

    def latest(self, profile: str, step: str, slot: str | None = None) -> Entry | None:
        """What a step last left for a profile, when it is still there and whole."""
        file = self.root / "latest" / profile / f"{slot or step}.json"
        try:
            key = json.loads(file.read_text("utf-8"))["key"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return self.find(step, key)

    def latest_keys(self) -> set[tuple[str, str]]:
        """Step and key of everything that some profile's last run left."""
        keys = set()
        for file in (self.root / "latest").glob("*/*.json"):
            with suppress(OSError, ValueError, KeyError, TypeError):
                keys.add((file.stem.partition("-")[0], json.loads(file.read_text("utf-8"))["key"]))
        return keys

    def _place(self, step: str, key: str) -> Path:
        return self.root / "outputs" / step / key

    def _read(self, step: str, key: str) -> Entry:
        place = self._place(step, key)
        origin = json.loads((place / "origin.json").read_text("utf-8"))
        output = place / "output"
        return Entry(step, key, output, Manifest.read(output), origin)

    def _damage(self, place: Path, manifest: Manifest) -> list[str]:
        output = place / "output"
        stamps = _stamps(output)
        try:
            known = json.loads((place / "verified.json").read_text("utf-8"))
        except (OSError, ValueError):
            known = None
        untouched = known == stamps
        problems = manifest.differences(output, hashes=not untouched)
        if not problems:
            # Also tells `prune` that it is in use. On a full disk the output is none the worse.
            with suppress(OSError):
                write_json(place / "verified.json", stamps)
        return problems


def _stamps(output: Path) -> dict[str, list[int]]:
    """How each file of an output looks; see `stamp_of`."""
    stamps = {}
    for file in [*walk_files(output), output / MANIFEST_NAME]:
        # A rename of the directory above leaves all of it as it is.
        stamps[file.relative_to(output).as_posix()] = stamp_of(file)
    return stamps


def is_full_disk(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, says that a disk is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if _FULL_IN_WORDS.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def _flock(file: Path, *, exclusive: bool, wait: bool) -> Iterator[None]:
    """Hold the system's lock on a file; it is gone when the process is, however that ends.

    Raises:
        BlockingIOError: somebody else holds it, and `wait` is False.
    """
    import fcntl

    mode = (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | (0 if wait else fcntl.LOCK_NB)
    with file.open("a") as stream:
        fcntl.flock(stream, mode)
        yield


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())


def _sync_tree(directory: Path) -> None:
    """Have the content on the disk before the name: a power cut leaves all of it or nothing."""
    for file in directory.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        else:
            _sync_directory(file)
    _sync_directory(directory)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
