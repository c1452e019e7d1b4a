"""What a process does to itself, in a process of its own."""

from __future__ import annotations

import os
import platform

import programs
import pytest

from workers.process import affinity


def test_threads_are_bounded_before_libraries_load() -> None:
    variables = affinity.environment(3)
    assert variables["OMP_NUM_THREADS"] == variables["TF_NUM_INTRAOP_THREADS"] == "3"
    assert variables["TF_ENABLE_ONEDNN_OPTS"] == "0"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity calls")
def test_pinning_is_done_and_verified() -> None:
    code = (
        "import os; from workers.process import affinity; core = min(os.sched_getaffinity(0));"
        "print(affinity.pin((core,)) == (core,) == tuple(os.sched_getaffinity(0)))"
    )
    done = programs.run(code)
    assert done.stdout.strip() == "True"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity calls")
def test_a_thread_may_be_anywhere_for_a_while_and_is_pinned_again() -> None:
    code = (
        "import os; from workers.process import affinity; cores = affinity.current_cores()\n"
        "affinity.pin(cores[:1])\n"
        "try:\n"
        "    with affinity.anywhere(cores):\n"
        "        print(affinity.current_cores() == cores)\n"
        "        raise OSError\n"
        "except OSError:\n"
        "    print(affinity.current_cores() == cores[:1])\n"
    )
    done = programs.run(code)
    assert done.stdout.split() == ["True", "True"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
@pytest.mark.parametrize("strategy", ["threads", "cpu_batch"])
def test_what_computes_keeps_the_memory_that_it_frees(strategy: str) -> None:
    """A large array made again and again: each time new pages (a fault each), or the same ones."""
    code = (
        "import resource, sys; import numpy as np; import qpool\n"
        "sys.path.append('tests'); from models import Scale\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(10): np.ones(1 << 22)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "as_it_was = faults()\n"
        f"with qpool.parallelize(Scale(), strategy={strategy!r}):\n"
        "    np.ones(1 << 22); print(10 * faults() < as_it_was)"
    )
    done = programs.run(code)
    assert done.stdout.strip() == "True"


def test_no_cores_means_no_pinning(monkeypatch: pytest.MonkeyPatch) -> None:
    before = affinity.current_cores()
    assert affinity.pin(()) == before
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert affinity.pin((0,)) == ()
