"""Bring .venv in line with conda.yaml and requirements/: ``setup_venv.py runtime|dev``.

Answers at once when there is nothing to do. Two of them at a time wait for each other. An
installation that was broken off is started over, one for other requirements is changed in place.
What pip says goes to ``.venv/install.log``; what is shown is how far it is. Uses the standard
library alone.
"""

from __future__ import annotations

import compileall
import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from requirement_files import (
    CONDA_YAML,
    EXTRA_FILES,
    REQUIREMENTS,
    ROOT,
    conda_pip_version,
    constraint_paths,
    direct_requirements,
)

VENV = ROOT / ".venv"
LOCK = ROOT / ".venv.lock"
BROKEN_OFF = VENV / ".installing"
LOG = VENV / "install.log"
COMPILED = VENV / ".compiled"
# Without a terminal a line of progress that often, in seconds; on one, a line that is rewritten.
QUIET_INTERVAL = 10.0
TERMINAL_INTERVAL = 0.5
# Folders of installed packages that no run imports; a package `testing` may well be imported.
NOT_COMPILED = r"/site-packages/(.*/)?(tests?|torch/testing/_internal)/"


OWN = ("phi3_mlflow", "steps")


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0] not in ("runtime", "dev"):
        print("usage: setup_venv.py runtime|dev", file=sys.stderr)
        return 2
    kind = arguments[0]
    if is_ready(kind) and is_compiled():
        compile_own()
        return 0
    with one_at_a_time() as lock:
        if is_ready(kind):
            compile_packages(lock)
            return 0
        started = time.monotonic()
        create_venv(lock)
        install(kind, lock)
        compile_packages(lock)
        mark_ready(kind)
        say(f".venv is ready ({time.monotonic() - started:.0f} s)")
    return 0


def digest(kind: str) -> str:
    """What the installed state depends on: the requirements, the interpreter and the place."""
    state = hashlib.sha256()
    extra = EXTRA_FILES[kind]
    files = [CONDA_YAML, *constraint_paths(kind), *([REQUIREMENTS / extra] if extra else [])]
    for path in files:
        state.update(path.read_bytes())
    # A virtual environment holds absolute paths: moved, or with its Python gone, it is of no use.
    state.update(f"{VENV}|{sys.version}|{Path(sys.executable).resolve()}".encode())
    return state.hexdigest()


def stamp(kind: str) -> Path:
    return VENV / f".ready-{kind}"


def is_ready(kind: str) -> bool:
    # What was installed for development holds everything that running needs.
    kinds = ("runtime", "dev") if kind == "runtime" else (kind,)
    if BROKEN_OFF.exists() or not (VENV / "bin" / "python").exists():
        return False
    return any(stamp(k).is_file() and stamp(k).read_text() == digest(k) for k in kinds)


def mark_ready(kind: str) -> None:
    stamp(kind).write_text(digest(kind))
    BROKEN_OFF.unlink()


@contextmanager
def one_at_a_time() -> Iterator[int]:
    """Hold the lock beside .venv; the kernel releases it when its holders end, in any way.

    Yields its descriptor. A pip that is started holds it too, so that one which outlives this
    process, killed, is waited for by the next.
    """
    with LOCK.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process is setting up .venv: waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle.fileno()


def create_venv(lock: int) -> None:
    """Make .venv with the pinned pip, or keep what is there if it is whole and of this Python."""
    home = _home_of(VENV)
    base = Path(sys.base_prefix).resolve()
    keep = home is not None and not BROKEN_OFF.exists() and base in home.resolve().parents
    if VENV.exists() and not keep:
        say("removing a .venv that is incomplete or of another Python")
        shutil.rmtree(VENV)
    if not keep:
        say(f"creating .venv with Python {sys.version.split()[0]}")
        _create_empty_venv()
    BROKEN_OFF.touch()
    COMPILED.unlink(missing_ok=True)
    wanted = conda_pip_version()
    pip = [str(VENV / "bin" / "python"), "-m", "pip"]
    shown = subprocess.run([*pip, "--version"], capture_output=True, text=True)
    if shown.returncode != 0 or shown.stdout.split()[1:2] != [wanted]:
        run_pip([*pip, "install", f"pip=={wanted}"], f"pip {wanted}", lock)


def _home_of(venv: Path) -> Path | None:
    """The directory of the Python a virtual environment was made with, None when it is unusable."""
    try:
        text = (venv / "pyvenv.cfg").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"^home\s*=\s*(.+)$", text, re.MULTILINE)
    usable = match is not None and (venv / "bin" / "python").exists()
    # A moved environment still names its old place in its scripts.
    script = venv / "bin" / "activate"
    moved = script.is_file() and str(venv) not in script.read_text(encoding="utf-8")
    same_version = re.search(rf"^version\s*=\s*{platform.python_version()}$", text, re.MULTILINE)
    if match is None or not usable or moved or not same_version:
        return None
    return Path(match.group(1).strip())


def _create_empty_venv() -> None:
    made = subprocess.run([sys.executable, "-m", "venv", str(VENV)], capture_output=True, text=True)
    if made.returncode == 0:
        return
    # Debian and Ubuntu keep ensurepip in a package of its own; a pip of the system will do as well.
    shutil.rmtree(VENV, ignore_errors=True)
    bare = subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(VENV)], capture_output=True, text=True
    )
    if bare.returncode == 0:
        bootstrap = [sys.executable, "-m", "pip", "--python", str(VENV / "bin" / "python")]
        wanted = f"pip=={conda_pip_version()}"
        if subprocess.run([*bootstrap, "install", "-q", wanted]).returncode == 0:
            return
    shutil.rmtree(VENV, ignore_errors=True)
    detail = (made.stdout + made.stderr + bare.stderr).strip()
    raise SystemExit(
        f"{sys.executable} cannot create a virtual environment:\n{detail}\n"
        "On Debian and Ubuntu install the package python3.11-venv, then try again."
    )


def install(kind: str, lock: int) -> None:
    """Install a set's requirements, bound to its constraints; pip's configuration is honoured."""
    command = [str(VENV / "bin" / "python"), "-m", "pip", "install", "--no-compile"]
    for path in constraint_paths(kind):
        command += ["-c", str(path)]
    requirements = direct_requirements(kind)
    run_pip([*command, *requirements], f"{len(requirements)} packages and what they need", lock)


def compile_packages(lock: int) -> None:
    """Compile packages and project, where the processes to come may not keep what they compile.

    With ``PYTHONDONTWRITEBYTECODE`` set, as in many containers, each of them would compile torch
    and mlflow anew: importing the two takes 11 s in place of 5. Elsewhere the first import of a
    module keeps its byte code, and compiling all of them at once would take longer than that.
    """
    compile_own()
    if is_compiled():
        return
    say("compiling the packages once, since PYTHONDONTWRITEBYTECODE keeps imports from doing it")
    command = [str(VENV / "bin" / "python"), "-m", "compileall", "-q", "-j", "0"]
    command += ["-x", NOT_COMPILED, str(VENV / "lib")]
    hidden = ("PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE")
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    with LOG.open("a", encoding="utf-8") as log:
        log.write(f"\n$ {' '.join(command)}\n")
        log.flush()
        # Its exit status tells of files that are no Python (templates); no import reads those.
        subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
            pass_fds=(lock,),
        )  # fmt: skip
    COMPILED.touch()


def is_compiled() -> bool:
    """Whether there is nothing to compile, or nowhere to keep it."""
    return not sys.flags.dont_write_bytecode or COMPILED.exists() or not os.access(VENV, os.W_OK)


def compile_own() -> None:
    """Compile what changed of the project, where no import keeps its byte code."""
    if sys.flags.dont_write_bytecode:
        for name in OWN:
            compileall.compile_dir(ROOT / name, quiet=2)


def run_pip(command: list[str], what: str, lock: int) -> None:
    """Run pip with its output in the log, showing progress; its last lines only when it fails."""
    # .venv's own Python and settings of the caller (PYTHONPATH) must not meet.
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    environment["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    environment["PIP_NO_INPUT"] = "1"
    environment["PYTHONUNBUFFERED"] = "1"
    options = ["--progress-bar", "off", "--no-color"]
    progress = Progress(what)
    with LOG.open("a", encoding="utf-8") as log:
        log.write(f"\n$ {' '.join(command)}\n")
        with (
            subprocess.Popen(
                [*command, *options],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=environment,
                pass_fds=(lock,),
            ) as process,
            progress,
        ):
            assert process.stdout is not None
            for line in process.stdout:
                log.write(line)
                progress.note(line)
    if process.returncode != 0:
        tail = LOG.read_text(encoding="utf-8").splitlines()[-25:]
        print("\n".join(tail), file=sys.stderr)
        raise SystemExit(
            f"Installing {what} failed (pip ended with {process.returncode}). The whole of what it "
            f"said is in {LOG}.\nNo connection to a package index, or a full disk, are the usual "
            "reasons; when mended, the same command goes on."
        )


class Progress:
    """One line that says what pip is at: rewritten on a terminal, else a new one now and then."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.phase = "looking for"
        self.detail = ""
        self.seen = 0
        self.started = time.monotonic()
        self.terminal = sys.stdout.isatty()
        self.done = threading.Event()
        self.ticker = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Progress:
        self.ticker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.ticker.join()
        if self.terminal:
            print("\r\033[K", end="", flush=True)

    def note(self, line: str) -> None:
        """Take in one line of pip's."""
        words = line.split()
        if line.startswith("Collecting ") and len(words) > 1:
            self.phase, self.detail = "collecting", re.split(r"[=<>!~;\[]", words[1])[0]
            self.seen += 1
        elif words[:1] == ["Downloading"] and len(words) > 1:
            name = words[1].rpartition("/")[2].split("-")[0]
            self.phase, self.detail = "downloading", f"{name} {' '.join(words[2:4])}".strip()
        elif line.startswith("Installing collected packages:"):
            self.phase, self.detail = "installing", f"{line.count(',') + 1} packages"
        elif line.startswith("Successfully installed"):
            self.phase, self.detail = "installed", f"{len(words) - 2} packages"

    def text(self) -> str:
        count = f"{self.seen} found, " if self.phase in ("collecting", "downloading") else ""
        seconds = time.monotonic() - self.started
        return f"{count}{self.phase} {self.detail or self.what} ({seconds:.0f} s)"

    def _tick(self) -> None:
        interval = TERMINAL_INTERVAL if self.terminal else QUIET_INTERVAL
        if not self.terminal:
            say(f"installing {self.what}")
        while not self.done.wait(interval):
            if self.terminal:
                print(f"\r\033[K{self.text()[:100]}", end="", flush=True)
            else:
                say(f"  {self.text()}")


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
