"""What a step costs: wall time, peak resident memory, bytes read and written."""

from __future__ import annotations

import sys
import time
from pathlib import Path

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class ResourceMeter:
    """Measures this process from its making on."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._io = _io_counters()
        _reset_peak()

    def figures(self) -> dict[str, float]:
        """What has been used so far.

        Returns:
            `wall_time_s` in seconds; `peak_rss_bytes`; `bytes_read` and `bytes_written`, those that
            passed through read and write calls (memory-mapped reads are not among them). The last
            two are left out where the platform does not count them.
        """
        figures = {
            "wall_time_s": round(time.monotonic() - self._start, 3),
            "peak_rss_bytes": float(peak_rss_bytes()),
        }
        before, now = self._io, _io_counters()
        if before and now:
            figures["bytes_read"] = float(now[0] - before[0])
            figures["bytes_written"] = float(now[1] - before[1])
        return figures


def peak_rss_bytes() -> int:
    """The peak resident memory of this process in bytes, since the last reset where that exists."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _reset_peak() -> None:
    """Let the kernel count the peak anew; without this a forked process inherits a higher one."""
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:  # not Linux, or not allowed: the peak then is that of the whole process
        return


def _io_counters() -> tuple[int, int] | None:
    import psutil

    try:
        counters = psutil.Process().io_counters()
    except (AttributeError, psutil.Error):
        return None
    return counters.read_chars, counters.write_chars
