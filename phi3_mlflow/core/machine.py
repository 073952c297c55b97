"""What this machine has: processor cores, memory, disk.

Limits of the control group count as much as the hardware: in a container with two cores and 4 GiB
on a large host, that is what there is.
"""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")
_CPUINFO = Path("/proc/cpuinfo")
_BFLOAT16 = {"amx_bf16", "avx512_bf16", "bf16"}  # Intel and AMD, and ARM's name for it


def usable_cores() -> int:
    """The processor cores that this process may use: by affinity, and by the group's quota."""
    cores = len(affinity()) or os.cpu_count() or 1
    quota = _group_cores()
    return max(1, cores if quota is None else min(cores, quota))


def affinity() -> list[int]:
    """The numbers of the cores that this process may run on; none where the system has no such."""
    try:
        return sorted(os.sched_getaffinity(0))
    except AttributeError:  # no such call on macOS and Windows
        return []


def group_seconds() -> float | None:
    """Processor time that the group with the tightest quota has used so far, of all its processes.

    None where no group has a quota, or the system does not say.
    """
    limited = _limited_group()
    if limited is None:
        return None
    try:
        lines = (limited[0] / "cpu.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next(
        (int(line.split()[1]) / 1e6 for line in lines if line.startswith("usage_usec ")), None
    )


def available_memory() -> int | None:
    """Bytes that a process can still take, by the system and by the control group if it limits.

    None where the system does not say.
    """
    found = [value for value in (_system_memory(), _group_memory()) if value is not None]
    return min(found) if found else None


def whole_memory() -> int | None:
    """Bytes that this machine has, used or not, and that the control group allows.

    None where the system does not say.
    """
    limits = (_number(group / "memory.max") for group in _groups())
    found = [value for value in (_memory("MemTotal"), *limits) if value is not None]
    return min(found) if found else None


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for bfloat16; without them it is emulated."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return False
    flags = (line.split(":", 1)[1].split() for line in lines if line.startswith(("flags", "Feat")))
    return not _BFLOAT16.isdisjoint(next(flags, []))


def free_disk(path: Path) -> int:
    """Free bytes on the disk that holds a path, or that will hold it once it exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def _system_memory() -> int | None:
    found = _memory("MemAvailable")
    return _memory("MemFree") if found is None else found


def _memory(name: str) -> int | None:
    """A line of the system's account of its memory; all there is where it keeps none."""
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
    except OSError:
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, ValueError, OSError):
            return None
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if ":" in line}
    return sizes.get(name)


def _group_memory() -> int | None:
    """What the tightest control group above this process leaves."""
    left = []
    for group in _groups():
        limit, used = _number(group / "memory.max"), _number(group / "memory.current")
        if limit is not None and used is not None:
            # Cached files count as used, and are given back when memory is wanted.
            left.append(max(0, limit - used + _cached(group)))
    return min(left) if left else None


def _group_cores() -> int | None:
    """Whole cores of the tightest quota above this process, at least one."""
    limited = _limited_group()
    return None if limited is None else limited[1]


def _limited_group() -> tuple[Path, int] | None:
    """The group above this process with the tightest quota, and its whole cores."""
    found = []
    for group in _groups():
        try:
            quota, period = (group / "cpu.max").read_text(encoding="ascii").split()
            found.append((group, max(1, math.floor(int(quota) / int(period)))))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return min(found, key=lambda one: one[1], default=None)


def _groups() -> list[Path]:
    """The control groups (version 2) of this process, its own first."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except OSError:
        return []
    own = next((line[3:] for line in lines if line.startswith("0::")), None)
    if own is None:
        return []
    group = _CGROUP / own.lstrip("/")
    # In a container the path may name a folder of the host, which is not there.
    if not group.is_relative_to(_CGROUP) or not group.is_dir():
        return [_CGROUP]
    return [group, *(above for above in group.parents if above.is_relative_to(_CGROUP))]


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):  # no such file, or "max"
        return None


def _cached(group: Path) -> int:
    try:
        lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
