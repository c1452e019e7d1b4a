"""Which cores there are, how many of them are ours, and which worker gets which.

Owns reading the machine. Everything is read afresh on each call, from the process's own point of
view: its affinity mask (which a cpuset narrows too) and its cgroup's CPU quota. Knows nothing of
processes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_SYSFS = Path("/sys/devices/system/cpu")
_NODES = Path("/sys/devices/system/node")
_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Budget:
    """The CPUs that this process may use.

    ``cpus`` are logical CPU numbers, one of each physical core first, then their SMT siblings, and
    among those the ones of a NUMA node together: a worker of several cores has its memory, which
    it touches first when it is pinned already, near all of them. ``physical`` is how many of them
    are physical cores. ``quota`` is the cgroup's limit in CPUs, None without one. ``nodes`` are the
    NUMA nodes, the CPUs of each. ``workers`` is how many single-core workers make sense.
    """

    cpus: tuple[int, ...]
    physical: int
    quota: float | None
    nodes: tuple[tuple[int, ...], ...] = ()

    @property
    def workers(self) -> int:
        limit = self.physical if self.quota is None else min(self.physical, int(self.quota))
        return max(1, limit)


def budget() -> Budget:
    """Read the CPU budget of this process."""
    if hasattr(os, "sched_getaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
    else:
        allowed = list(range(os.cpu_count() or 1))
    nodes = _nodes(allowed)
    allowed = [cpu for node in nodes for cpu in node]
    cpus, physical = physical_first(allowed, {cpu: _siblings(cpu) for cpu in allowed})
    if not hasattr(os, "sched_getaffinity"):
        import psutil

        physical = psutil.cpu_count(logical=False) or physical
    return Budget(cpus, physical, _quota(), nodes)


def physical_first(
    allowed: list[int], siblings: dict[int, frozenset[int]]
) -> tuple[tuple[int, ...], int]:
    """Order logical CPUs so that each physical core comes once before any comes twice.

    ``siblings[cpu]`` are the logical CPUs of the same physical core, ``cpu`` among them. Returns
    the order and the number of physical cores. Pure.
    """
    seen: set[frozenset[int]] = set()
    first: list[int] = []
    rest: list[int] = []
    for cpu in allowed:
        (rest if siblings[cpu] in seen else first).append(cpu)
        seen.add(siblings[cpu])
    return (*first, *rest), len(first)


def assign(workers: int, cpus: tuple[int, ...], threads: int = 1) -> list[tuple[int, ...]]:
    """CPUs for each worker, ``threads`` of them each; all empty (unpinned) if they do not reach.

    Pure. Sharing a core between two pinned workers would be worse than letting the system move
    them, so it is all or none.
    """
    if workers * threads > len(cpus):
        return [()] * workers
    return [cpus[n * threads : (n + 1) * threads] for n in range(workers)]


def parse_cpu_list(text: str) -> frozenset[int]:
    """The kernel's list format: ``"0-3,8"`` is {0, 1, 2, 3, 8}."""
    cpus: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        low, _, high = part.partition("-")
        cpus.update(range(int(low), int(high or low) + 1))
    return frozenset(cpus)


def _siblings(cpu: int) -> frozenset[int]:
    try:
        return parse_cpu_list((_SYSFS / f"cpu{cpu}/topology/thread_siblings_list").read_text())
    except (OSError, ValueError):
        return frozenset({cpu})


def _nodes(allowed: list[int]) -> tuple[tuple[int, ...], ...]:
    """The CPUs by NUMA node; all in one where the system does not tell."""
    nodes = []
    for folder in sorted(_NODES.glob("node[0-9]*"), key=lambda path: int(path.name[4:])):
        try:
            cpus = parse_cpu_list((folder / "cpulist").read_text())
        except (OSError, ValueError):
            continue
        nodes.append(tuple(cpu for cpu in allowed if cpu in cpus))
    known = {cpu for node in nodes for cpu in node}
    rest = tuple(cpu for cpu in allowed if cpu not in known)
    return tuple(node for node in (*nodes, rest) if node)


def _quota() -> float | None:
    """CPUs per second that the cgroup allows, the tightest on the way to the root."""
    limits = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        inside = Path(path.lstrip("/"))
        for folder in (inside, *inside.parents):
            if not controllers:  # version 2
                limits.append(_ratio(_CGROUPS / folder / "cpu.max"))
            elif "cpu" in controllers.split(","):
                base = _CGROUPS / controllers / folder
                limits.append(_ratio(base / "cpu.cfs_quota_us", base / "cpu.cfs_period_us"))
    found = [limit for limit in limits if limit is not None]
    return min(found) if found else None


def cgroup() -> Path:
    """This process's own cgroup (version 2), or the root of all."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    paths = [line.split(":", 2)[2] for line in lines if line.startswith("0::")]
    return _CGROUPS / paths[0].lstrip("/") if paths else _CGROUPS


def _ratio(*files: Path) -> float | None:
    try:
        quota, period = " ".join(file.read_text() for file in files).split()
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # no such file, or "max"
        return None
