"""Whether the grammar of a JSON schema can be made and followed, tried in another process.

The library makes a grammar where the model is, holding everything else up meanwhile, and where an
allocation fails the whole process is gone. So every schema is tried first where neither matters
(see `grammar_child`), once; what was found is remembered. What passes takes as much, or as little,
where the model is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import OrderedDict
from pathlib import Path
from typing import Any

MOST_SECONDS = 0.5
"""Of computing, for a grammar or for one token that follows it."""
MOST_BYTES = 256 << 20
_REMEMBERED = 1024
_PATIENCE_S = 120.0  # on a machine that computes something else, too
_AGAIN_S = 60.0  # where no process could be started

_SIGNALS = signal.Signals.__members__  # not every system has all

log = logging.getLogger(__name__)


class GrammarTrial:
    """Tries schemas for one model; safe to use from several threads at once.

    Args:
        folder: holds genai_config.json and the tokenizer.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: OrderedDict[bytes, str | None] = OrderedDict()
        self._guard = threading.Lock()
        self._turn = threading.Lock()
        self._child: _Child | None = None
        self._not_before = 0.0

    def knows(self, schema: str) -> bool:
        """Whether a schema was tried already."""
        with self._guard:
            return _digest(schema) in self._known

    def refusal(self, schema: str) -> str | None:
        """Why a schema cannot be followed; None when it can.

        One that is new takes a moment, and waits for others that are being tried.
        """
        digest = _digest(schema)
        with self._turn if not self.knows(schema) else contextlib.nullcontext():
            with self._guard:
                if digest in self._known:
                    self._known.move_to_end(digest)
                    return self._known[digest]
            why, lasting = self._try(schema)
            if lasting:
                with self._guard:
                    self._known[digest] = why
                    if len(self._known) > _REMEMBERED:
                        self._known.popitem(last=False)
            return why

    def _try(self, schema: str) -> tuple[str | None, bool]:
        """What was found, and whether it would be found again."""
        for _ in range(2):
            child = self._running()
            if child is None or not child.guides:  # the engine itself says what is missing
                return None, child is not None
            heard = child.ask(schema)
            if heard is not None:
                return _judged(heard), True
            self._child = None
            code = child.end()
            if why := _died(code):
                return why, True
            # It may have ended for another reason: with nothing to do, just as this came.
        return "its grammar could not be made: the process that tried it ended", False

    def _running(self) -> _Child | None:
        """The process that tries; None where there can be none."""
        # After a fork there is a copy of this object, and the process belongs to the original.
        if self._child is not None and self._child.owner == os.getpid():
            return self._child
        child = None
        if time.monotonic() < self._not_before:
            return None
        try:
            child = _Child(self._folder)
        except (OSError, ValueError) as error:
            self._not_before = time.monotonic() + _AGAIN_S
            log.warning(
                "no process to try JSON schemas in (%s): they are only looked at before the model "
                "follows them",
                error,
            )
        self._child = child
        return child


class _Child:
    """The process, from its start to its end.

    Attributes:
        owner: the process that started it.
        guides: whether the library can follow schemas at all.

    Raises:
        OSError, ValueError: it cannot be started.
    """

    def __init__(self, folder: Path) -> None:
        self.owner = os.getpid()
        script = Path(__file__).with_name("grammar_child.py")
        given = (str(folder), str(MOST_BYTES), str(MOST_SECONDS))
        # What this process imports the other one finds, too; `-P`: but not what lies beside it.
        places = os.pathsep.join(place for place in sys.path if place)
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(script), *given],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env={**os.environ, "PYTHONPATH": places, "ORT_DISABLE_TELEMETRY": "1"},
            encoding="utf-8",
        )
        self._finish = weakref.finalize(self, _end, self._process)
        heard = self._answer()
        if heard is None:
            code = self.end()
            self._said.seek(0)
            said = self._said.read().decode(errors="replace").splitlines()
            raise ValueError(f"it ended with {code} as it began: {said[-1] if said else ''}")
        self.guides = bool(heard["guides"])

    def end(self) -> int:
        """End the process; the code that it ended with."""
        return int(self._finish() or 0)

    def ask(self, schema: str) -> dict[str, Any] | None:
        """What a schema costs; None when the process is gone."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(schema) + "\n")
            self._process.stdin.flush()
        except OSError:
            return None
        return self._answer()

    def _answer(self) -> dict[str, Any] | None:
        assert self._process.stdout is not None
        # Ends the wait on every system: what is read then is the end.
        patience = threading.Timer(_PATIENCE_S, self._process.kill)
        patience.daemon = True
        patience.start()
        try:
            heard = json.loads(self._process.stdout.readline())
        except (OSError, ValueError):
            return None
        finally:
            patience.cancel()
        return heard if isinstance(heard, dict) else None


def _end(process: subprocess.Popen[str]) -> int:
    """Let the process end, by force if it does not; the code that it ended with."""
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            if pipe is not None:
                pipe.close()
    try:
        return process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _judged(heard: dict[str, Any]) -> str | None:
    if "error" in heard:
        return str(heard["error"])
    for name, what in (("grammar_s", "its grammar"), ("token_s", "a token that follows it")):
        if heard[name] > MOST_SECONDS:
            return f"{what} takes {heard[name]:.1f} s, at most {MOST_SECONDS} s are taken"
    return None


def _died(code: int) -> str:
    """What a schema is told that ended the process; empty if it may have been something else."""
    told = {
        "SIGXCPU": f"its grammar takes more than {MOST_SECONDS} s",
        "SIGABRT": f"its grammar takes more than {MOST_BYTES >> 20} MB",
        "SIGSEGV": "its grammar is nested too deep",
    }
    numbers = {-int(getattr(signal, name)): why for name, why in told.items() if name in _SIGNALS}
    return numbers.get(code, "")


def _digest(schema: str) -> bytes:
    return hashlib.sha256(schema.encode()).digest()
