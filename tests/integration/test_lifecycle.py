"""Real processes and real signals: workers die and are replaced, and nothing is left behind."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
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

Z = tf.constant(np.random.default_rng(0).normal(size=(8, 2)) ** 2, tf.float32)
TESTS = Path(__file__).resolve().parents[1]

posix = pytest.mark.skipif(os.name != "posix", reason="POSIX signals")


def bits(generator, z):
    with tf.GradientTape() as tape:
        out = generator(z)
        loss = tf.reduce_sum(out**2)
    return out.numpy().tobytes(), tape.gradient(loss, generator.w).numpy().tobytes()


def pids(pool) -> list[int]:
    return [worker["pid"] for worker in pool.stats()["workers"]]


def at_full_strength(pool, model) -> list[int]:
    """The pids, once the successors of workers that died in an earlier test have joined.

    They join while the pool works, so it is given work until they have.
    """
    deadline = time.monotonic() + 120
    while None in pids(pool):
        assert time.monotonic() < deadline, "a successor did not come up"
        model(Z)
    return pids(pool)


def gone(processes: list[psutil.Process], seconds: float = 10.0) -> list[psutil.Process]:
    return psutil.wait_procs(processes, seconds)[1]


@pytest.fixture(scope="module")
def spare():
    """A pool whose workers may be killed."""
    with qpool.Pool(workers=2, timeout=30) as pool:
        yield pool


def test_the_handshake_reports_who_the_workers_are(spare) -> None:
    spare.start()
    for worker in spare.stats()["workers"]:
        assert psutil.Process(worker["pid"]).is_running()
        assert worker["versions"]["tensorflow"] == tf.__version__
        assert worker["threads"]["tensorflow_intra_op"] == 1
        assert worker["threads"]["OMP_NUM_THREADS"] == "1"
        if worker["pinned"]:
            assert tuple(psutil.Process(worker["pid"]).cpu_affinity()) == worker["cores"]


@posix
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_a_worker_that_dies_in_a_tile_changes_no_bit(spare, tmp_path, how, caplog) -> None:
    z = tf.concat([Z[:-1], -Z[-1:]], 0)
    with parallelize(models.Killing(str(tmp_path), 0), pool=spare, tile=2) as model:
        expected = bits(model, z)
    before = spare.stats()["replaced_workers"]
    with (
        caplog.at_level(logging.WARNING, "qpool"),
        parallelize(models.Killing(str(tmp_path), 2, how), pool=spare, tile=2) as model,
    ):
        assert bits(model, z) == expected
    assert spare.stats()["replaced_workers"] == before + 2
    assert how.name in caplog.text


@posix
def test_a_worker_that_dies_between_forward_and_backward(spare) -> None:
    with parallelize(models.Scale(), pool=spare, tile=2) as model:
        workers = at_full_strength(spare, model)
        expected = bits(model, Z)
        with tf.GradientTape() as tape:
            out = model(Z)
            loss = tf.reduce_sum(out**2)
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        gradient = tape.gradient(loss, model.w)
        assert (out.numpy().tobytes(), gradient.numpy().tobytes()) == expected
        assert spare.stats()["recomputed_tiles"] >= 4


@posix
def test_tiles_that_kill_every_worker_are_given_up_and_named(spare, tmp_path) -> None:
    z = tf.concat([Z[:2], -Z[2:4], Z[4:]], 0)
    with parallelize(models.Killing(str(tmp_path), 99), pool=spare, tile=2) as model:
        model(Z)
        with pytest.raises(errors.WorkerLostError, match=r"^samples 2 to 3 took 3 .*\n.*SIGKILL"):
            model(z)
        np.testing.assert_allclose(model(Z), 2 * Z)


@posix
def test_a_stopped_worker_is_replaced_after_the_timeout(tmp_path) -> None:
    with (
        qpool.Pool(workers=2, timeout=1.0) as pool,
        parallelize(models.Scale(), pool=pool, tile=2) as model,
    ):
        expected = bits(model, Z)
        os.kill(pids(pool)[0], signal.SIGSTOP)
        assert bits(model, Z) == expected
        assert pool.stats()["replaced_workers"] == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forkserver is Linux's")
def test_the_forkservers_own_death_is_survived() -> None:
    with (
        qpool.Pool(workers=1) as pool,
        parallelize(models.Scale(), pool=pool) as model,
    ):
        model(Z)
        forkserver = psutil.Process(psutil.Process(pids(pool)[0]).ppid())
        assert forkserver.ppid() == os.getpid()
        forkserver.kill()
        np.testing.assert_allclose(model(Z), 2 * Z)
        os.kill(pids(pool)[0], signal.SIGKILL)
        np.testing.assert_allclose(model(Z), 2 * Z)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forkserver is Linux's")
def test_an_answer_left_by_an_interrupted_request_is_not_taken_for_another() -> None:
    import pickle

    from workers.process import forkserver_main

    with (
        qpool.Pool(workers=1) as pool,
        parallelize(models.Scale(), pool=pool) as model,
    ):
        # Ctrl-C between a request and its answer: the answer is still to be read.
        control = pool._supervisor.launcher.server._control
        control.send(pickle.dumps(forkserver_main.Reap(2**22 + 1)))
        os.kill(pids(pool)[0], signal.SIGKILL)
        np.testing.assert_allclose(model(Z), 2 * Z)
        assert psutil.Process(pids(pool)[0]).is_running()


def test_spawn_gives_the_same_bits() -> None:
    model = models.Displaced(cutoff=3)
    found = []
    for method in (None, "spawn"):
        with parallelize(model, workers=1, start_method=method, tile=2) as generator:
            found.append(generator(Z[:3]).numpy().tobytes())
            pool = generator.stats()["pool"]
            processes = [psutil.Process(worker["pid"]) for worker in pool["workers"]]
            assert pool["start_method"] == (method or "forkserver")
        assert not gone(processes)
    assert found[0] == found[1]


SCRIPT = """
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    import models, qpool, tensorflow as tf
    generator = qpool.parallelize(models.Scale(), workers=2, start_method={method!r})
    z = tf.ones((8, 2))
    assert float(tf.reduce_sum(generator(z))) == 32.0
    pids = [w["pid"] for w in generator.stats()["pool"]["workers"]]
    import psutil
    print(*{{*pids, *(c.pid for c in psutil.Process().children(recursive=True))}}, flush=True)
    {end}
"""


def coordinator(end: str, method: str | None = None) -> subprocess.Popen:
    code = textwrap.dedent(SCRIPT).format(tests=str(TESTS), method=method, end=end)
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@posix
@pytest.mark.parametrize("method", [None, "spawn"])
@pytest.mark.parametrize(
    ("end", "sent"),
    [
        ("sys.exit(0)", None),
        ("os._exit(3)", None),
        ("raise RuntimeError('ends badly')", None),
        ("signal.pause()", signal.SIGKILL),
        ("signal.pause()", signal.SIGTERM),
        ("signal.pause()", signal.SIGINT),
    ],
)
def test_nothing_is_left_behind(end: str, sent: int | None, method: str | None) -> None:
    if method == "spawn" and sent != signal.SIGKILL:
        pytest.skip("one ending is enough for the slower start")
    process = coordinator(end, method)
    line = process.stdout.readline()
    assert line, process.stderr.read()
    left = [psutil.Process(int(pid)) for pid in line.split() if psutil.pid_exists(int(pid))]
    if sent is not None:
        process.send_signal(sent)
    _, err = process.communicate(timeout=30)
    assert not gone(left, 2.0), "processes outlived their coordinator by two seconds"
    assert "resource_tracker" not in err
    assert "leaked" not in err


@posix
def test_ctrl_c_in_a_call_leaves_the_pool_usable(tmp_path) -> None:
    code = """
        import os, signal, sys, threading
        sys.path.insert(0, {tests!r})
        import models, numpy as np, qpool, tensorflow as tf
        class Slow(models.Scale):
            def __call__(self, z):
                if float(tf.reduce_min(z)) < 0 and not os.path.exists({flag!r}):
                    open({flag!r}, "w").close()
                    os.kill(os.getppid() if {spawn} else {{main}}, signal.SIGINT)
                    import time; time.sleep(1.0)
                return super().__call__(z)
        if __name__ == "__main__":
            z = tf.ones((4, 2))
            generator = qpool.parallelize(Slow(), workers=1, start_method="spawn")
            generator(z)
            try:
                generator(-z)
            except KeyboardInterrupt:
                print("interrupted", float(tf.reduce_sum(generator(z))), flush=True)
            generator.close()
    """
    code = textwrap.dedent(code).format(tests=str(TESTS), flag=str(tmp_path / "flag"), spawn=True)
    done = subprocess.run(
        [sys.executable, "-c", code.replace("{main}", "0")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.strip() == "interrupted 16.0", done.stderr


def _in_a_child(queue) -> None:
    with parallelize(models.Scale(), workers=1) as generator:
        queue.put(float(tf.reduce_sum(generator(Z))))


def test_nested_in_a_daemonic_multiprocessing_child() -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_in_a_child, args=(queue,), daemon=True)
    process.start()
    assert queue.get(timeout=120) == pytest.approx(2 * float(tf.reduce_sum(Z)), rel=1e-6)
    process.join(30)
    assert process.exitcode == 0


def test_callers_from_several_threads_take_turns(pool) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with (
        parallelize(models.Scale(), pool=pool, tile=2) as generator,
        ThreadPoolExecutor(4) as threads,
    ):
        futures = [threads.submit(lambda n=n: generator(Z * n).numpy()) for n in range(20)]
        for n, future in enumerate(futures):
            np.testing.assert_allclose(future.result(), 2 * n * Z, rtol=1e-6)


def test_a_script_without_a_main_guard_works_under_spawn(tmp_path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
            import qpool, tensorflow as tf
            class Mine:
                def __init__(self):
                    self.w = tf.Variable(3.0)
                    self.trainable_variables = [self.w]
                def __call__(self, z):
                    return helper(z) * self.w
            def helper(z):
                return z + 1
            with qpool.parallelize(Mine(), workers=1, start_method="spawn") as generator:
                print(float(generator(tf.ones((1, 1)))[0, 0]))
        """)
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.strip() == "6.0", done.stderr
