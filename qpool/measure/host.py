"""The machine, as it matters to a pool: read from the system, with advice where it stands in the
way of speed. Owns the reading; decides and changes nothing.

Linux tells all of it; elsewhere what cannot be read is left out.
"""

from __future__ import annotations

import dataclasses
import os
import platform
from pathlib import Path

import psutil

from qpool.executors import topology

_CPUS = Path("/sys/devices/system/cpu")
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

#: Memory below which two workers are hardly comfortable, in bytes.
_LITTLE_MEMORY = 2 << 30


@dataclasses.dataclass(frozen=True)
class Finding:
    """One fact. ``status`` is "ok", "advice" (slower than it could be) or "wrong" (does not work).

    ``advice`` says what to do where it is not ok.
    """

    name: str
    value: str
    status: str = "ok"
    advice: str = ""


def findings() -> list[Finding]:
    """All that can be read here."""
    found = [_cpus(), _budget(), _nodes(), _governor(), _turbo(), _load()]
    found += [_memory(), _huge_pages(), _allocator(), _threads()]
    return [finding for finding in found if finding is not None]


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _cpus() -> Finding:
    logical = psutil.cpu_count() or 1
    physical = psutil.cpu_count(logical=False) or logical
    smt = ", two threads each" if logical == 2 * physical else ""
    return Finding("processor", f"{processor()}: {physical} cores{smt}")


def _budget() -> Finding:
    budget = topology.budget()
    value = f"{budget.physical} cores, {len(budget.cpus)} logical"
    if budget.quota is not None:
        value += f", a quota of {budget.quota:g} CPUs"
    value += f": {budget.workers} workers"
    if budget.quota is not None and budget.quota < budget.physical:
        advice = (
            "the cgroup gives less time than there are cores: more workers than it allows are "
            "stopped in the middle of a tile; raise the quota, or use cpusets"
        )
        return Finding("ours", value, "advice", advice)
    total = psutil.cpu_count(logical=False) or budget.physical
    if budget.physical < total:
        return Finding("ours", f"{value} (of {total} cores: affinity or a cpuset narrows it)")
    return Finding("ours", value)


def _nodes() -> Finding:
    nodes = topology.budget().nodes
    sizes = ", ".join(str(len(node)) for node in nodes)
    if len(nodes) < 2:
        return Finding("NUMA nodes", "one")
    return Finding(
        "NUMA nodes", f"{len(nodes)}, of {sizes} CPUs; workers are pinned, and touch memory first"
    )


def _governor() -> Finding | None:
    governors = sorted({_read(path) for path in _CPUS.glob("cpu[0-9]*/cpufreq/scaling_governor")})
    if not governors:
        return None
    slow = [name for name in governors if name in ("powersave", "conservative", "ondemand")]
    driver = _read(_CPUS / "cpu0/cpufreq/scaling_driver")
    if slow and driver not in ("intel_pstate", "amd-pstate-epp"):  # whose powersave is dynamic
        advice = "cores start slowly after each wait: cpupower frequency-set -g performance"
        return Finding("scaling governor", ", ".join(governors), "advice", advice)
    return Finding("scaling governor", f"{', '.join(governors)} ({driver})")


def _turbo() -> Finding | None:
    off = _read(_CPUS / "intel_pstate/no_turbo")
    boost = _read(_CPUS / "cpufreq/boost")
    if not off and not boost:
        return None
    on = off == "0" or boost == "1"
    advice = "" if on else "cores stay at their base frequency; it can be set in the firmware"
    return Finding("turbo", "on" if on else "off", "ok" if on else "advice", advice)


def _load() -> Finding | None:
    if not hasattr(os, "getloadavg"):
        return None
    load, cores = os.getloadavg()[0], topology.budget().physical
    if load > 0.5 * cores:
        advice = "something else computes here: workers will be slower, and measurements wrong"
        return Finding("load", f"{load:.1f} over the last minute", "advice", advice)
    return Finding("load", f"{load:.1f} over the last minute")


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    value = f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB available"
    if memory.available < _LITTLE_MEMORY:
        advice = "a worker needs 0.2 to 1.5 GiB, and the shared segment more: use fewer workers"
        return Finding("memory", value, "advice", advice)
    return Finding("memory", value)


def _huge_pages() -> Finding | None:
    text = _read(_HUGE_PAGES)
    if "[" not in text:
        return None
    chosen = text[text.index("[") + 1 : text.index("]")]
    if chosen == "never":
        advice = (
            "large circuits touch many pages: echo madvise > " + str(_HUGE_PAGES) + " lets "
            "programs that ask have large ones"
        )
        return Finding("transparent huge pages", chosen, "advice", advice)
    return Finding("transparent huge pages", chosen)


def _allocator() -> Finding:
    preloaded = os.environ.get("LD_PRELOAD", "")
    for name in ("jemalloc", "tcmalloc", "mimalloc"):
        if name in preloaded:
            return Finding("allocator", name)
    library, version = platform.libc_ver()
    if library == "glibc":
        return Finding("allocator", f"glibc {version}; what computes is told to keep freed memory")
    advice = (
        "freed memory is given back and asked for anew, up to four times slower for large "
        "states; an allocator that keeps it (jemalloc, mimalloc) may be preloaded"
    )
    return Finding("allocator", f"{library or 'the system'} {version}".strip(), "advice", advice)


def _threads() -> Finding | None:
    named = [name for name in os.environ if name.endswith("_NUM_THREADS")]
    if not named:
        return None
    values = ", ".join(f"{name}={os.environ[name]}" for name in sorted(named))
    return Finding("thread variables", f"{values} (workers set their own)")


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def throttling() -> tuple[float | None, int | None]:
    """Seconds that the cgroup's quota has held processes back so far, and how often cores were
    slowed down for their heat; None where the system does not tell."""
    seconds = None
    for line in _read(topology.cgroup() / "cpu.stat").splitlines():
        name, _, value = line.partition(" ")
        if name == "throttled_usec":
            seconds = int(value) / 1e6
    counts = [_read(path) for path in _CPUS.glob("cpu[0-9]*/thermal_throttle/core_throttle_count")]
    numbers = [int(count) for count in counts if count.isdigit()]
    return seconds, sum(numbers) if numbers else None
