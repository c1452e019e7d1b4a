"""Workers that fail at chosen points, in every way: the step returns the same bits.

The faults are real (signals, exits, a refused allocation) and strike where
``workers.exchange.faults`` says, so no test waits for the right moment.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import models
import numpy as np
import psutil
import pytest
import tensorflow as tf
from pooling import parallelize

import qpool
from qpool import errors
from qpool.children import forkserver, process
from qpool.executors.processes import supervisor, timeouts
from workers.exchange.faults import Fault
from workers.process import forkserver_main

Z = tf.constant(np.random.default_rng(0).normal(size=(8, 2)), tf.float32)
TESTS = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(os.name != "posix", reason="POSIX signals")


def bits(generator):
    with tf.GradientTape() as tape:
        out = generator(Z)
        loss = tf.reduce_sum(out**2)
    return out.numpy().tobytes(), tape.gradient(loss, generator.w).numpy().tobytes()


def at_full_strength(pool, generator) -> None:
    """Work until the successors of lost workers have joined."""
    deadline = time.monotonic() + 60
    while len(pool._supervisor.ready) < pool.workers:
        assert time.monotonic() < deadline, "a successor did not come up"
        generator(Z)


@pytest.fixture(scope="module")
def pool():
    with qpool.Pool(workers=2, timeout=1.0) as pool:
        yield pool


@pytest.fixture(scope="module")
def generator(pool):
    with parallelize(models.Scale(), pool=pool, tile=2) as generator:
        yield generator


@pytest.fixture(scope="module")
def expected(generator):
    return bits(generator)


FAULTS = [
    *((point, "kill") for point in ("load", "forward", "backward", "written", "answer", "loop")),
    *(("forward", action) for action in ("segv", "abort", "exit", "stop", "raise", "memory")),
    ("backward", "memory"),
    ("backward", "stop"),
    ("answer", "raise"),
    ("written", "stop"),
]


@pytest.mark.parametrize(("point", "action"), FAULTS)
def test_a_step_survives(pool, generator, expected, caplog, point: str, action: str) -> None:
    at_full_strength(pool, generator)
    before = pool.stats()
    pool.inject(1, Fault(point, action, after=int(point in ("forward", "backward", "written"))))
    with caplog.at_level(logging.WARNING, "qpool"):
        assert bits(generator) == expected
    after = pool.stats()
    assert after["replaced_workers"] == before["replaced_workers"] + 1
    assert "worker 1" in caplog.text
    lost = after["retried_tiles"] - before["retried_tiles"]
    # Shards are two tiles: what was finished before the fault is not computed again.
    assert lost == {"written": 1, "forward": 1, "backward": 1, "answer": 0}.get(point, 2)


def test_both_workers_at_once(pool, generator, expected) -> None:
    at_full_strength(pool, generator)
    pool.inject(0, Fault("forward", "kill"))
    pool.inject(1, Fault("backward", "abort", after=1))
    assert bits(generator) == expected


@pytest.mark.parametrize("point", ["start", "hello", "build"])
def test_a_successor_that_dies_while_it_starts(pool, generator, expected, point: str) -> None:
    at_full_strength(pool, generator)
    pool._supervisor.faults_at_start.append((Fault(point, "kill"),))
    pool.inject(0, Fault("forward", "kill"))
    assert bits(generator) == expected
    at_full_strength(pool, generator)
    assert not pool._supervisor.faults_at_start
    assert bits(generator) == expected


def test_workers_that_die_while_the_pool_starts() -> None:
    pool = qpool.Pool(workers=2)
    pool._supervisor.faults_at_start.extend([(Fault("start", "kill"),), (Fault("hello", "raise"),)])
    with pool, parallelize(models.Scale(), pool=pool, tile=2) as generator:
        np.testing.assert_allclose(generator(Z), 2 * Z)


def test_processes_that_are_stopped_while_the_pool_starts(monkeypatch, caplog) -> None:
    """The fork server while it imports, then a worker: nobody waits as long as for loading."""
    monkeypatch.setenv("QPOOL_OF_THIS_TEST", "1")  # a fork server of its own, that has to load
    for module in (supervisor, forkserver):
        monkeypatch.setattr(module, "STOPPED_TIMEOUT", 0.5)
    with qpool.Pool(workers=1) as pool, caplog.at_level(logging.WARNING, "qpool"):
        os.kill(pool._supervisor.launcher.server.pid, signal.SIGSTOP)
        pool._supervisor.faults_at_start.append((Fault("start", "stop"),))
        pool.start()
    assert "it was stopped" in caplog.text
    assert "was stopped for" in caplog.text


def test_a_pool_whose_workers_never_come_up_says_why() -> None:
    pool = qpool.Pool(workers=1)
    pool._supervisor.faults_at_start.extend([(Fault("start", "raise"),)] * 3)
    with pytest.raises(errors.StartupError, match=r"(?s)3 workers in a row.*raised on purpose"):
        pool.start()
    assert pool.closed


def test_a_worker_that_dies_as_a_model_comes(pool, generator) -> None:
    at_full_strength(pool, generator)
    pool.inject(0, Fault("build", "kill"))
    with parallelize(models.Scale(3.0), pool=pool, tile=2) as other:
        np.testing.assert_allclose(other(Z), 3 * Z)
        np.testing.assert_allclose(generator(Z), 2 * Z)


def test_a_model_and_its_first_call_wait_for_a_worker_where_none_is_left(pool_of) -> None:
    pool = pool_of(1)
    pool.start()

    def none_is_left() -> None:
        os.kill(pool.stats()["workers"][0]["pid"], signal.SIGKILL)
        while pool._supervisor.ready:
            pool._supervisor.events()

    none_is_left()
    with parallelize(models.Scale(3.0), pool=pool) as generator:
        none_is_left()
        np.testing.assert_allclose(generator(Z), 3 * Z)


class Poison(models.Scale):
    """Ends the process that unpickles it."""

    def __setstate__(self, state) -> None:
        os._exit(7)


def test_a_model_that_kills_who_builds_it_is_refused(pool, generator, expected) -> None:
    at_full_strength(pool, generator)
    with pytest.raises(errors.StartupError, match=r"(?s)3 workers.*exit code 7"):
        parallelize(Poison(), pool=pool)
    assert bits(generator) == expected


@pytest.mark.parametrize(
    ("action", "wanted"),
    [
        ("segv", r"(?s)SIGSEGV.*Segmentation fault.*replica|faults\.py"),
        ("memory", r"(?s)ran out of memory.*Traceback.*MemoryError"),
        ("raise", r"(?s)exit code 1.*Traceback.*raised on purpose"),
    ],
)
def test_what_is_given_up_carries_each_attempts_traceback(
    pool, generator, expected, action: str, wanted: str
) -> None:
    at_full_strength(pool, generator)
    for number in range(2):
        pool.inject(number, Fault("forward", action))
    pool._supervisor.faults_at_start.extend([(Fault("forward", action),)] * 2)
    with pytest.raises(errors.WorkerLostError, match=r"^samples 0 to 1 took 3 workers") as caught:
        generator(Z[:2])
    assert re.search(wanted, str(caught.value))
    assert str(caught.value).count("(pid ") == 3
    pool._supervisor.faults_at_start.clear()
    np.testing.assert_allclose(generator(Z), 2 * Z)
    at_full_strength(pool, generator)
    for number in range(2):  # successors that carry a fault which has not struck yet
        pool._supervisor.ready[number].kill()
    assert bits(generator) == expected


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forkserver is Linux's")
@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
def test_a_worker_and_its_forkserver_are_lost_together(pool, generator, expected, how) -> None:
    at_full_strength(pool, generator)
    forkserver = psutil.Process(pool._supervisor.launcher.server.pid)
    forkserver.send_signal(how)
    pool.inject(1, Fault("forward", "kill"))
    assert bits(generator) == expected
    at_full_strength(pool, generator)
    assert not forkserver.is_running()


def test_a_silent_worker_is_found_by_how_long_its_tiles_took(monkeypatch, expected) -> None:
    monkeypatch.setattr(timeouts, "LEAST", 0.5)
    with (
        qpool.Pool(workers=2) as pool,
        parallelize(models.Scale(), pool=pool, tile=2) as generator,
    ):
        assert bits(generator) == bits(generator) == expected
        pool.inject(0, Fault("forward", "stop"))
        assert bits(generator) == expected
        assert pool.stats()["replaced_workers"] == 1


class Forking(models.Scale):
    """Starts two processes that outlive it: one holds copies of all its descriptors."""

    def __init__(self) -> None:
        super().__init__()
        self.started = False

    def __call__(self, z):
        if not self.started:
            self.started = True
            subprocess.Popen(["sleep", "30"], close_fds=False)
            if os.fork() == 0:
                time.sleep(30)
                os._exit(0)
        return super().__call__(z)


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="the system must tell of the end")
def test_a_workers_end_is_seen_though_its_children_hold_its_channel() -> None:
    with (
        qpool.Pool(workers=2) as pool,
        parallelize(Forking(), pool=pool, tile=2) as generator,
    ):
        expected = bits(generator)
        pids = [worker["pid"] for worker in pool.stats()["workers"]]
        children = [c for pid in pids for c in psutil.Process(pid).children()]
        assert len(children) >= 4
        pool.inject(1, Fault("forward", "kill"))
        assert bits(generator) == expected
    for child in psutil.Process().children(recursive=True):
        assert child.pid not in pids
    for child in children:
        child.kill()


class Leaking(models.Scale):
    """Keeps four mebibytes with each call."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = []

    def __call__(self, z):
        self.kept.append(np.ones(1 << 19))
        return super().__call__(z)


def test_a_worker_that_grows_is_replaced_between_steps(caplog, monkeypatch) -> None:
    monkeypatch.setattr(supervisor, "_WARM_SECONDS", 1.0)
    with (
        caplog.at_level(logging.WARNING, "qpool"),
        qpool.Pool(workers=1, max_growth=1.2) as pool,
        parallelize(Leaking(), pool=pool, tile=8) as generator,
    ):
        expected = bits(generator)
        first = pool.stats()["workers"][0]["pid"]
        deadline = time.monotonic() + 60
        while pool.stats()["workers"][0]["pid"] == first:
            assert time.monotonic() < deadline, "it was not replaced"
            assert bits(generator) == expected
        stats = pool.stats()
        assert (stats["outgrown_workers"], stats["replaced_workers"]) == (1, 0)
        assert stats["retried_tiles"] == 0
        assert "has grown to" in caplog.text
        assert not psutil.pid_exists(first)


@pytest.mark.parametrize("engine", ["stock", "traced"])
def test_a_new_worker_joins_warm(pool, caplog, engine: str) -> None:
    """It has compiled what the others have, before it is given anything to do."""
    model = models.Displaced(cutoff=3)
    with qpool.parallelize(model, pool=pool, tile=2, engine=engine) as generator:
        seen = bits(generator)
        pool.inject(0, Fault("forward", "kill"))
        caplog.clear()
        assert bits(generator) == seen
        at_full_strength(pool, generator)
        assert bits(generator) == seen
        assert "rehearse" not in caplog.text


@pytest.mark.parametrize("where", ["_event", "bury", "_launch"])
def test_ctrl_c_anywhere_in_the_supervisor_costs_a_worker_at_most(
    pool, generator, expected, monkeypatch, where: str
) -> None:
    at_full_strength(pool, generator)
    original, left = getattr(supervisor.Supervisor, where), [None]

    def interrupted(self, *args):
        found = original(self, *args)
        if left:
            left.pop()
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(supervisor.Supervisor, where, interrupted)
    if where != "_event":
        pool.inject(1, Fault("forward", "kill"))

    def work() -> None:
        for _ in range(20):
            generator(Z)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert bits(generator) == expected
    at_full_strength(pool, generator)
    assert bits(generator) == expected


def test_a_message_that_a_stopped_worker_does_not_take_up(monkeypatch, expected) -> None:
    monkeypatch.setattr(process, "_SEND_TIMEOUT", 1)
    with (
        qpool.Pool(workers=2, timeout=1.0) as pool,
        parallelize(models.Scale(), pool=pool, tile=2) as generator,
    ):
        assert bits(generator) == expected
        os.kill(pool.stats()["workers"][1]["pid"], signal.SIGSTOP)
        large = np.ones(1 << 21)  # as a constant of another model: far more than a channel holds
        with parallelize(Large(large), pool=pool, tile=2) as other:
            np.testing.assert_allclose(other(Z), 2 * Z)
        assert bits(generator) == expected
        assert pool.stats()["replaced_workers"] == 1


class Large(models.Scale):
    def __init__(self, array) -> None:
        super().__init__()
        self.array = array


def test_a_pool_closed_in_the_middle_of_a_call(monkeypatch) -> None:
    """As a signal handler may do it: the call ends, and starts nothing anew."""
    pool = qpool.Pool(workers=1)
    generator = parallelize(models.Scale(), pool=pool, tile=2)
    generator(Z)
    original = supervisor.Supervisor._event
    monkeypatch.setattr(supervisor.Supervisor, "_event", lambda *a: (original(*a), pool.close())[0])
    with pytest.raises(errors.PoolClosedError):
        bits(generator)
    assert not pool._supervisor.ready
    assert not pool._supervisor._joining


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forkserver is Linux's")
def test_a_forks_answer_to_an_interrupted_request_is_not_taken_for_another(
    pool, generator, expected
) -> None:
    at_full_strength(pool, generator)
    launcher = pool._supervisor.launcher
    ours, theirs = multiprocessing.Pipe()
    end, segment = theirs.fileno(), pool._performer.shared.segment.handle
    handles = [end, segment, 1, 2, end]
    request = pickle.dumps(forkserver_main.Fork(-1, {}, os.getcwd()))
    socket.send_fds(launcher.server._control, [request], handles)
    ours.close()
    theirs.close()
    pool.inject(1, Fault("forward", "kill"))
    assert bits(generator) == expected
    at_full_strength(pool, generator)
    for number, worker in pool._supervisor.ready.items():
        assert worker.pid == worker.hello.pid, number


def script(code: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code).replace("TESTS", repr(str(TESTS)))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forkserver is Linux's")
def test_a_coordinator_killed_while_its_forkserver_imports_leaves_nothing() -> None:
    process = script("""
        import qpool, signal
        pool = qpool.Pool(workers=1)
        print(pool._supervisor.launcher.server.pid, flush=True)
        signal.pause()
    """)
    forkserver = psutil.Process(int(process.stdout.readline()))
    process.kill()
    process.communicate(timeout=30)
    assert not psutil.wait_procs([forkserver], 2.0)[1]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forkserver is Linux's")
@pytest.mark.parametrize("stopped", ["forkserver", "worker"])
def test_what_is_stopped_ends_too_when_the_coordinator_is_killed(stopped: str) -> None:
    process = script("""
        import os, qpool, signal
        pool = qpool.Pool(workers=2).start()
        workers = [worker["pid"] for worker in pool.stats()["workers"]]
        print(pool._supervisor.launcher.server.pid, *workers, flush=True)
        signal.pause()
    """)
    pids = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
    pids[stopped == "worker"].suspend()
    process.kill()
    process.communicate(timeout=30)
    assert not psutil.wait_procs(pids, 2.0)[1]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity calls here")
def test_one_core_and_a_second_pool() -> None:
    core = min(os.sched_getaffinity(0))
    process = script(f"""
        import os, logging, sys
        os.sched_setaffinity(0, {{{core}}})
        sys.path.insert(0, TESTS)
        logging.basicConfig(level="WARNING")
        import models, qpool, tensorflow as tf
        from qpool.executors.processes import claims
        claims.PREFIX = f"qpool-test-{{os.getpid()}}"
        def cores(pool):
            return [(w["cores"], w["pinned"]) for w in pool.start().stats()["workers"]]
        with qpool.Pool() as first, qpool.Pool() as second:
            print(cores(first), cores(second))
            with qpool.parallelize(models.Scale(), pool=second, engine="stock") as generator:
                assert float(tf.reduce_sum(generator(tf.ones((4, 2))))) == 16
        with qpool.Pool() as again:
            print(cores(again))
    """)
    out, err = process.communicate(timeout=120)
    assert out.splitlines() == [
        f"[(({core},), True)] [(({core},), False)]",
        f"[(({core},), True)]",
    ], err
    assert err.count("other pools of this machine") == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_nothing_listens_and_the_segment_has_no_name(pool, generator) -> None:
    at_full_strength(pool, generator)
    pids = [os.getpid(), pool._supervisor.launcher.server.pid]
    pids += [worker["pid"] for worker in pool.stats()["workers"]]
    for pid in pids[1:]:
        found = psutil.Process(pid).net_connections(kind="all")
        assert not [c for c in found if c.status == psutil.CONN_LISTEN]
        assert not [c for c in found if c.laddr and not isinstance(c.laddr, str)]
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert "/dev/shm" not in maps
    assert "memfd:qpool" in maps
