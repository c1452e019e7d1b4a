"""What a process does to itself, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from workers import affinity


def test_threads_are_bounded_before_libraries_load() -> None:
    variables = affinity.environment(3)
    assert variables["OMP_NUM_THREADS"] == variables["TF_NUM_INTRAOP_THREADS"] == "3"
    assert variables["TF_ENABLE_ONEDNN_OPTS"] == "0"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity calls")
def test_pinning_is_done_and_verified() -> None:
    code = (
        "import os; from workers import affinity; core = min(os.sched_getaffinity(0));"
        "print(affinity.pin((core,)) == (core,) == tuple(os.sched_getaffinity(0)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_no_cores_means_no_pinning(monkeypatch: pytest.MonkeyPatch) -> None:
    before = affinity.current_cores()
    assert affinity.pin(()) == before
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert affinity.pin((0,)) == ()
