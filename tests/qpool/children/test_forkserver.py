"""One fork server for all pools of a program: shared, kept for a while, and gone in the end."""

from __future__ import annotations

import os
import sys

import numpy as np
import psutil
import pytest
import tensorflow as tf
from pooling import parallelize

import qpool
from qpool.children import forkserver

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's way")

Z = tf.ones((2, 1))


class Tells:
    """Writes down where it is called."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.w = tf.Variable(1.0)
        self.trainable_variables = [self.w]

    def __call__(self, z):
        with open(self.path, "w") as file:
            file.write(f"{os.getcwd()} {os.environ.get('WORD')} {os.environ.get('GONE')}")
        os.write(1, b"said to the output\n")
        return z * self.w


def parent(pool: qpool.Pool) -> psutil.Process:
    return psutil.Process(psutil.Process(pool.stats()["workers"][0]["pid"]).ppid())


@pytest.fixture
def server() -> psutil.Process:
    """Of pools of this process, with its folder and variables as they are before the test."""
    with qpool.Pool(workers=1) as pool:
        return parent(pool.start())


def test_pools_share_it_and_each_ends_its_own_workers(server) -> None:
    with qpool.Pool(workers=1) as first:
        with qpool.Pool(workers=1) as second:
            assert parent(second.start()) == parent(first.start()) == server
            own = psutil.Process(second.stats()["workers"][0]["pid"])
        assert not own.is_running()
        assert first.stats()["workers"][0]["pid"] in {c.pid for c in server.children()}
    assert not server.children()
    with qpool.Pool(workers=1) as third:
        assert parent(third.start()) == server


def test_a_worker_is_as_its_pools_maker_at_that_time(server, tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.setenv("WORD", "said")
    monkeypatch.delenv("HOSTNAME", raising=False)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "told"
    with parallelize(Tells(str(path)), workers=1) as generator:
        assert generator.stats()["pool"]["workers"][0]["pid"] in {c.pid for c in server.children()}
        generator(Z)
    assert path.read_text() == f"{tmp_path} said None"
    assert "said to the output" in capfd.readouterr().out


def test_variables_that_libraries_read_while_they_load_want_another_one(
    server, monkeypatch
) -> None:
    monkeypatch.setenv("TF_SOMETHING_OF_OURS", "1")
    with qpool.Pool(workers=1) as pool:
        assert parent(pool.start()) != server
    psutil.wait_procs([server], 5)
    assert not server.is_running()  # one is kept, no more


def test_one_that_nobody_uses_ends(monkeypatch) -> None:
    monkeypatch.setattr(forkserver, "KEPT_SECONDS", 0.01)
    with qpool.Pool(workers=1) as pool:
        server = parent(pool.start())
    assert not psutil.wait_procs([server], 10)[1]
    monkeypatch.undo()
    with parallelize(Tells("/dev/null"), workers=1) as generator:
        np.testing.assert_allclose(generator(Z), Z)


def test_one_that_died_or_hangs_while_nobody_used_it_is_replaced(server) -> None:
    server.kill()
    psutil.wait_procs([server], 5)
    with qpool.Pool(workers=1) as pool:
        assert parent(pool.start()) != server
