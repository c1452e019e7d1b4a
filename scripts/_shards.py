"""The check and the whole suite, several pytests side by side.

One pytest uses about one core: TensorFlow traces, and XLA compiles, in one thread most of the time.
So the suite is cut into shards, each a process of its own that ends (TensorFlow keeps what it has
compiled for as long as a process lives), and as many run at once as there are cores, if there is
memory for them. Owns the cut and the sum; what each shard says is pytest's.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

#: Shards by beginnings of paths, of which the longest decides; what none names is in ``REST``.
#: Those that take longest come first, so that no core is idle at the end; ``faults``, which has
#: short timeouts, when those of ``WAITING`` are done, most likely.
SHARDS: dict[str, list[str]] = {
    "cluster": ["tests/integration/test_cluster.py"],
    "engine": ["tests/workers"],
    "calls": ["tests/integration/"],
    "training": [
        "tests/qpool/training",
        "tests/integration/test_loss",
        "tests/integration/test_second_order.py",
    ],
    "runs": [
        "tests/integration/test_campaigns.py",
        "tests/integration/test_runs.py",
        "tests/test_cli.py",
    ],
    "bits": [
        "tests/integration/test_same_bits.py",
        "tests/integration/test_equality.py",
    ],
    "faults": ["tests/integration/test_faults.py", "tests/integration/test_lifecycle.py"],
    "rest": [],
    "measure": [
        "tests/qpool/executors",
        "tests/qpool/measure",
        "tests/qpool/studies",
        "tests/integration/test_appl",
    ],
}
REST = "rest"

#: Formatting, lint and types, which take one core for a while.
CHECK = "check"

#: Shards whose programs XLA compiles as it does for users. For those of all others it takes a
#: quarter of the time; their code is slower, and as right.
AS_SHIPPED = ("bits",)

#: What waits more than it computes, for Ray's processes to start. It runs beside all others.
WAITING = ("cluster",)

#: What makes it so, where it is known: a flag that XLA does not know ends the process.
QUICK = {
    "2.21": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false"
}

#: Memory that a shard and its workers may need.
_GIB = 6

_PYTEST = ["-m", "pytest", "-q", "--no-header", "--durations=8"]

_COUNT = re.compile(r"(\d+) (passed|failed|skipped|errors?|xfailed|deselected)\b")


def paths(root: Path) -> dict[str, list[str]]:
    """The files of each shard: every test file is in one."""
    found: dict[str, list[str]] = {name: [] for name in SHARDS}
    for file in sorted((root / "tests").rglob("test_*.py")):
        name = file.relative_to(root).as_posix()
        lengths = {
            shard: max((len(path) for path in own if name.startswith(path)), default=0)
            for shard, own in SHARDS.items()
        }
        home = max(lengths, key=lengths.__getitem__)
        found[home if lengths[home] else REST].append(name)
    return found


def run(interpreter: Path, root: Path) -> int:
    """Run all shards; the exit code. Prints each one's end, and all of it where it failed."""
    began = time.monotonic()
    children: list[subprocess.Popen] = []
    counts: dict[str, int] = {}
    failed = []
    quick = _quick(interpreter)
    with (
        ThreadPoolExecutor(_side_by_side()) as threads,
        ThreadPoolExecutor(1) as beside,
        tempfile.TemporaryDirectory(prefix="qpool-tests-") as compiled,
    ):
        check = threads.submit(_one, [sys.executable, "scripts/check"], root, children, {})
        futures = {check: CHECK} | {
            (beside if name in WAITING else threads).submit(
                _one,
                [str(interpreter), *_PYTEST, *files],
                root,
                children,
                {"QPOOL_TESTS_CACHE": compiled} | ({} if name in AS_SHIPPED else quick),
            ): name
            for name, files in paths(root).items()
            if files
        }
        try:
            for future in as_completed(futures):
                name, (code, said, seconds) = futures[future], future.result()
                last = said.strip().splitlines()[-1].strip("= ") if said.strip() else "said nothing"
                for number, word in _COUNT.findall(last if name != CHECK else ""):
                    counts[word] = counts.get(word, 0) + int(number)
                if code:
                    failed.append(name)
                    print(said)
                print(f"[{name}] {last} ({seconds:.0f} s in all)", flush=True)
        except KeyboardInterrupt:
            for future in futures:
                future.cancel()
            for child in children:
                if child.poll() is None:
                    child.send_signal(signal.SIGINT)
            raise
    errors = counts.get("error", 0) + counts.get("errors", 0)
    bad = counts.get("failed", 0) + errors or len(failed)
    print(f"{time.monotonic() - began:.0f} s; shards that failed: {', '.join(failed) or 'none'}")
    print(f"{counts.get('passed', 0)} passed, {bad} failed, {counts.get('skipped', 0)} skipped")
    return 1 if failed else 0


def _one(
    command: list[str],
    root: Path,
    children: list[subprocess.Popen],
    environment: dict[str, str],
) -> tuple[int, str, float]:
    began = time.monotonic()
    child = subprocess.Popen(
        command,
        cwd=root,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    children.append(child)
    said, _ = child.communicate()
    return child.returncode, said, time.monotonic() - began


def _quick(interpreter: Path) -> dict[str, str]:
    """Variables that have XLA compile quickly, for the TensorFlow that is installed."""
    code = "from importlib import metadata; print(metadata.version('tensorflow'))"
    version = subprocess.run([str(interpreter), "-c", code], capture_output=True, text=True).stdout
    flags = QUICK.get(".".join(version.split(".")[:2]))
    return {"QPOOL_TESTS_QUICK": flags} if flags else {}


def _side_by_side() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = _GIB * 2**30 * (2 + len(WAITING))
    if hasattr(os, "sysconf") and sys.platform != "darwin":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(cores or 1, memory // (_GIB * 2**30) - len(WAITING)))
