"""What the machine has, limits of the control group included."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from phi3_mlflow.core import machine

GIB = 2**30


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A made-up tree of control groups, in which this process is in `box`."""
    (tmp_path / "box").mkdir()
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    monkeypatch.setattr(machine, "_groups", lambda: [tmp_path / "box", tmp_path])
    return tmp_path


def limit_memory(group: Path, limit: str, used: int, cached: int = 0) -> None:
    (group / "memory.max").write_text(f"{limit}\n")
    (group / "memory.current").write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"anon {used - cached}\ninactive_file {cached}\n")


def test_without_limits_the_system_counts(groups: Path) -> None:
    limit_memory(groups, "max", GIB)
    (groups / "cpu.max").write_text("max 100000\n")
    system = machine._system_memory()
    assert system is not None
    assert abs((machine.available_memory() or 0) - system) < GIB / 4
    assert machine.usable_cores() == len(os.sched_getaffinity(0))


def test_the_tightest_memory_limit_counts(groups: Path) -> None:
    limit_memory(groups, str(3 * GIB), GIB)
    limit_memory(groups / "box", str(2 * GIB), GIB)
    assert machine.available_memory() == GIB
    limit_memory(groups, str(3 * GIB), 3 * GIB - 5)
    assert machine.available_memory() == 5


def test_cached_files_are_given_back_when_memory_is_wanted(groups: Path) -> None:
    limit_memory(groups / "box", str(2 * GIB), 2 * GIB, cached=GIB)
    assert machine.available_memory() == GIB


def test_used_beyond_the_limit_is_nothing_left(groups: Path) -> None:
    limit_memory(groups / "box", str(GIB), 2 * GIB)
    assert machine.available_memory() == 0


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("150000 100000", 1), ("50000 100000", 1), ("100000 100000", 1), ("6400000 100000", 64)],
)
def test_cores_are_what_the_quota_allows_and_never_none(
    groups: Path, quota: str, cores: int
) -> None:
    (groups / "box" / "cpu.max").write_text(f"{quota}\n")
    assert machine.usable_cores() == min(cores, len(os.sched_getaffinity(0)))


def test_what_shares_a_quota_is_counted_together(groups: Path) -> None:
    assert machine.group_seconds() is None, "no group has one"
    for group, quota, used in ((groups, "400000 100000", 9), (groups / "box", "200000 100000", 3)):
        (group / "cpu.max").write_text(f"{quota}\n")
        assert machine.group_seconds() is None, "the system does not say"
        (group / "cpu.stat").write_text(f"usage_usec {used}500000\nuser_usec 1\n")
        assert machine.group_seconds() == used + 0.5
        (groups / "box" / "cpu.stat").unlink(missing_ok=True)


def test_affinity_counts(monkeypatch: pytest.MonkeyPatch, groups: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    assert machine.usable_cores() == 1


def test_the_groups_of_this_process_are_found_where_there_are_any() -> None:
    for group in machine._groups():
        assert group == machine._CGROUP or machine._CGROUP in group.parents


def test_a_group_that_only_the_host_sees_is_replaced_by_the_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    found = machine._groups()
    assert found in ([], [tmp_path])


def test_disk_is_asked_where_the_path_will_be(tmp_path: Path) -> None:
    assert machine.free_disk(tmp_path / "not" / "there" / "yet") > 0


@pytest.mark.parametrize(
    ("cpuinfo", "native"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_bf16\n", True),
        ("flags\t\t: fpu avx2 amx_bf16 amx_tile\n", True),
        ("flags\t\t: fpu avx2 avx512f avx512bw\n", False),
        ("Features\t: fp asimd sve bf16 i8mm\n", True),
        ("", False),
    ],
)
def test_bfloat16_by_the_processors_flags(
    cpuinfo: str, native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "cpuinfo")
    assert machine.multiplies_bfloat16() is native
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "none")
    assert not machine.multiplies_bfloat16()


def test_the_whole_memory_does_not_depend_on_what_is_used(groups: Path) -> None:
    limit_memory(groups, "max", 0)
    whole = machine.whole_memory()
    assert whole is not None
    assert whole == machine._memory("MemTotal")
    limit_memory(groups / "box", str(GIB), used=GIB // 2)
    assert machine.whole_memory() == GIB
    limit_memory(groups / "box", str(GIB), used=GIB)
    assert machine.whole_memory() == GIB
