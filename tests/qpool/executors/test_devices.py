"""Devices by their names, and a real pool over two kinds of them."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from models import Placed
from pooling import parallelize

from qpool.errors import ConfigurationError, StartupError
from qpool.executors.devices import Seat, parse

CPUS = tuple(range(16))


def test_the_example() -> None:
    seats = parse(["cpu:0-13", "gpu:0"], CPUS, 1)
    assert seats == [*(Seat("cpu", (n,)) for n in range(14)), Seat("gpu:0", ())]


def test_workers_of_several_threads_and_visible_gpus() -> None:
    assert parse(["cpu"], CPUS[:5], 2) == [Seat("cpu", (0, 1)), Seat("cpu", (2, 3))]
    assert parse(["gpu:0-1"], CPUS, 1, "3,5") == [Seat("gpu:3", ()), Seat("gpu:5", ())]


@given(st.sets(st.integers(0, 15), min_size=1), st.integers(1, 4))
def test_no_core_has_two_workers(cores, threads) -> None:
    name = "cpu:" + ",".join(map(str, cores))
    if len(cores) < threads:
        with pytest.raises(ConfigurationError, match="fewer than threads"):
            parse([name], CPUS, threads)
        return
    seats = parse([name], CPUS, threads)
    taken = [core for seat in seats for core in seat.cores]
    assert len(taken) == len(set(taken)) == len(cores) // threads * threads
    assert set(taken) <= cores


@pytest.mark.parametrize(
    ("devices", "words"),
    [
        ([], "must be a list"),
        ("cpu", "must be a list"),
        (["gpus:0"], "did you mean 'gpu'"),
        (["gpu"], "wants a number"),
        (["cpu:a"], "no numbers after its colon"),
        (["cpu:40"], r"may not use CPUs \[40\]"),
        (["cpu:0", "cpu"], "names 0 twice"),
        (["gpu:1", "gpu:1"], "names gpu:1 twice"),
    ],
)
def test_what_is_no_device(devices, words) -> None:
    with pytest.raises(ConfigurationError, match=words):
        parse(devices, CPUS, 1)


def test_a_gpu_that_is_not_visible() -> None:
    with pytest.raises(ConfigurationError, match="has 1, from gpu:0"):
        parse(["gpu:1"], CPUS, 1, "7")


def test_a_mixed_pool_computes_on_both_and_more_where_it_is_faster(caplog) -> None:
    z = tf.zeros((32, 2))
    with caplog.at_level(logging.WARNING, "qpool"):
        generator = parallelize(Placed(), devices=["cpu:0", "virtual:1"], tile=1)
    assert "the same bits are not promised" in caplog.text
    with generator:
        assert set(np.unique(generator(z))) == {0.0, 1.0}
        for _ in range(20):
            found = generator(z).numpy()[:, 0]
        assert (found == 1.0).sum() > (found == 0.0).sum() > 0
        devices = [worker["device"] for worker in generator.stats()["pool"]["workers"]]
        assert devices == ["cpu", "virtual:1"]


def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(StartupError, match="finds no such GPU here"):
        parallelize(Placed(), devices=["gpu:0"])


def test_devices_and_workers() -> None:
    with pytest.raises(ConfigurationError, match="leave workers=2 out"):
        parallelize(Placed(), 2, devices=["cpu"])
