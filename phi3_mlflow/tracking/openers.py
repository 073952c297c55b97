"""Whether the `mlflow run` that opened a run may still be there, as far as this machine can tell.

MLflow does not write down which process opened a run. But it keeps the store open as long as it
lives: where that is a SQLite file on a disk of this machine, it is a process of the user that the
run names, older than the run, and with SQLite loaded. Where no process is like that, nobody will
ever begin the run. Of all other stores nothing can be said: another machine may be at work.
"""

from __future__ import annotations

import getpass
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    import psutil

_SLACK_S = 2.0  # between two clocks of one machine
_OWN_DISKS = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "jfs", "tmpfs")
_OF_A_CONTAINER = ("overlay",)
_PREFIX = "sqlite:///"
_IN_A_CONTAINER = ("/.dockerenv", "/run/.containerenv")


def opener_is_gone(run_id: str, user: str | None, began: float, tracking_uri: str) -> bool:
    """Whether the process that opened a run is provably no more.

    Args:
        run_id: of the run.
        user: that MLflow noted.
        began: seconds since the epoch.
        tracking_uri: of the store that the run is in.
    """
    if not Path("/proc/self/maps").is_file() or not only_of_this_machine(tracking_uri):
        return False
    try:
        if user != getpass.getuser():
            return False
    except (KeyError, OSError):  # no entry in the password database, as in many containers
        return False
    return not any(_may_have_opened(process, run_id, began) for process in _processes())


def only_of_this_machine(tracking_uri: str) -> bool:
    """Whether a tracking store is a file that only processes seen from here can have open."""
    if not tracking_uri.startswith(_PREFIX):
        return False
    file = Path(tracking_uri.removeprefix(_PREFIX).partition("?")[0]).absolute()
    import psutil

    contained = any(Path(mark).exists() for mark in _IN_A_CONTAINER)
    contained = contained or "KUBERNETES_SERVICE_HOST" in os.environ
    # What is mounted into a container may be written to from outside.
    own = _OF_A_CONTAINER if contained else _OWN_DISKS
    mounts = [
        (len(Path(disk.mountpoint).parts), disk.fstype)
        for disk in psutil.disk_partitions(all=True)
        if file.is_relative_to(disk.mountpoint)
    ]
    return bool(mounts) and max(mounts)[1] in own


def _processes() -> Iterator[psutil.Process]:
    import psutil

    for process in psutil.process_iter():
        if process.pid != os.getpid():
            yield process


def _may_have_opened(process: psutil.Process, run_id: str, began: float) -> bool:
    import psutil

    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        if process.create_time() > began + _SLACK_S:
            # What goes on in the background is handed the run's id.
            return any(run_id in word for word in process.cmdline())
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return _mine(process)
    try:
        maps = Path(f"/proc/{process.pid}/maps").read_text("utf-8", errors="replace")
    except FileNotFoundError:
        return False
    except OSError:
        return _mine(process)
    return "sqlite" in maps


def _mine(process: psutil.Process) -> bool:
    """Whether a process that cannot be looked at is of this user, so that it may be the one."""
    with suppress(Exception):
        return bool(process.uids().real == os.getuid())
    return True
