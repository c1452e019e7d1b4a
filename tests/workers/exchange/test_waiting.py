"""A waiter says whose channel can be read, with and without ``poll``."""

import os
import select
import subprocess
import sys
from multiprocessing import Pipe

import pytest

from workers.exchange.waiting import Waiter


@pytest.fixture(params=["poll", "no poll"])
def waiter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Waiter:
    """Of strings; without ``poll`` as on Windows."""
    if request.param == "no poll":
        monkeypatch.delattr(select, "poll")
    elif not hasattr(select, "poll"):
        pytest.skip("no poll on this system")
    return Waiter(spin=0.0)


def test_who_can_be_read(waiter: Waiter) -> None:
    (here_a, there_a), (here_b, there_b) = Pipe(), Pipe()
    waiter.add("a", here_a)
    waiter.add("b", here_b)
    assert waiter.wait(0.0) == []
    there_b.send_bytes(b"x")
    assert waiter.wait(None) == ["b"]
    there_a.send_bytes(b"x")
    assert sorted(waiter.wait(None)) == ["a", "b"]
    waiter.remove("b")
    assert waiter.wait(None) == ["a"]
    for channel in (here_a, there_a, here_b, there_b):
        channel.close()


def test_the_end_of_a_channel_is_heard(waiter: Waiter) -> None:
    here, there = Pipe()
    waiter.add("a", here)
    there.close()
    assert waiter.wait(None) == ["a"]
    here.close()


def test_nobody_is_there_twice_and_a_stranger_is_removed_in_silence(waiter: Waiter) -> None:
    here, there = Pipe()
    waiter.add("a", here)
    waiter.remove("somebody")
    there.send_bytes(b"x")
    there.close()
    assert waiter.wait(None) == ["a"]
    here.close()


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="no descriptors of processes here")
def test_the_end_of_a_process_is_heard_where_its_channel_stays_open() -> None:
    waiter: Waiter[str] = Waiter(spin=1e-4)
    here, there = Pipe()
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    handle = os.pidfd_open(process.pid)
    waiter.add("a", here, handle)
    assert waiter.wait(0.0) == []
    there.send_bytes(b"x")
    assert (waiter.wait(None), waiter.ended) == (["a"], set())
    here.recv_bytes()
    process.communicate(b"\n")
    assert (waiter.wait(None), waiter.ended) == (["a"], {"a"})
    os.close(handle)
    here.close()
    there.close()
