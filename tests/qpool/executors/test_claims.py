"""Cores taken by one pool are not given to another, and come back however a process ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

from qpool.executors.processes import claims

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's names")

#: CPUs that no machine has.
CPUS = range(100_000, 100_004)


def test_free_cores_are_taken_in_order_and_no_core_twice() -> None:
    first, second, third = claims.Claims(), claims.Claims(), claims.Claims()
    assert first.take(CPUS, 2) == (100_000, 100_001)
    assert second.take(CPUS, 2) == (100_002, 100_003)
    assert third.take(CPUS, 1) == ()
    first.release()
    assert third.take(CPUS, 1) == (100_000,)
    second.release()
    third.release()


def test_too_few_free_ones_leave_all_of_them_free() -> None:
    first, second = claims.Claims(), claims.Claims()
    assert first.take(CPUS, 3) == (100_000, 100_001, 100_002)
    assert second.take(CPUS, 2) == ()
    assert second.take(CPUS, 1) == (100_003,)
    first.release()
    second.release()


def test_a_process_that_is_killed_gives_them_back() -> None:
    code = f"""
from qpool.executors.processes import claims
claims.PREFIX = {claims.PREFIX!r}
mine = claims.Claims()
print(mine.take(range(100_000, 100_004), 4), flush=True)
import signal
signal.pause()
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline().startswith("(100000")
    here = claims.Claims()
    assert here.take(CPUS, 1) == ()
    holder.kill()
    holder.communicate()
    assert here.take(CPUS, 4) == tuple(CPUS)
    here.release()


def test_a_forked_process_does_not_hold_them() -> None:
    code = f"""
import os, time
from qpool.executors.processes import claims
claims.PREFIX = {claims.PREFIX!r} + "/fork"
mine = claims.Claims()
assert mine.take(range(100_000, 100_002), 2)
ready, told = os.pipe()
child = os.fork()
if child == 0:
    os.write(told, b"x")
    time.sleep(30)
os.read(ready, 1)
mine.release()
print(claims.Claims().take(range(100_000, 100_002), 2))
os.kill(child, 9)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.strip() == "(100000, 100001)", done.stderr
